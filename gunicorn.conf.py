"""Gunicorn's settings for the ready application; command-line flags win over these."""

from agentao_web.workers import bind
from agentao_web.workers import control_socket_disable
from agentao_web.workers import graceful_timeout
from agentao_web.workers import keepalive
from agentao_web.workers import limit_request_line
from agentao_web.workers import nworkers_changed
from agentao_web.workers import on_starting
from agentao_web.workers import post_fork
from agentao_web.workers import post_worker_init
from agentao_web.workers import pre_fork
from agentao_web.workers import threads
from agentao_web.workers import timeout
from agentao_web.workers import worker_class
from agentao_web.workers import worker_connections
from agentao_web.workers import worker_exit
from agentao_web.workers import worker_int
from agentao_web.workers import workers

__all__ = [
    "bind",
    "control_socket_disable",
    "graceful_timeout",
    "keepalive",
    "limit_request_line",
    "nworkers_changed",
    "on_starting",
    "post_fork",
    "post_worker_init",
    "pre_fork",
    "threads",
    "timeout",
    "worker_class",
    "worker_connections",
    "worker_exit",
    "worker_int",
    "workers",
]
