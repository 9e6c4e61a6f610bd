"""Gunicorn's settings for the ready application; command-line flags win over these."""

from agentao_web.workers import control_socket_disable
from agentao_web.workers import graceful_timeout
from agentao_web.workers import keepalive
from agentao_web.workers import post_worker_init
from agentao_web.workers import threads
from agentao_web.workers import timeout
from agentao_web.workers import worker_class
from agentao_web.workers import worker_connections
from agentao_web.workers import worker_exit
from agentao_web.workers import worker_int
from agentao_web.workers import workers

__all__ = [
    "control_socket_disable",
    "graceful_timeout",
    "keepalive",
    "post_worker_init",
    "threads",
    "timeout",
    "worker_class",
    "worker_connections",
    "worker_exit",
    "worker_int",
    "workers",
]
