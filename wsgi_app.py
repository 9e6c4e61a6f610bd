"""The ready WSGI application: every setting comes from the environment."""

from agentao_web import create_app

app = create_app()
