"""A client in Python: ``Client(url, token=…).ask("a-session", "hello").text``.

It knows the protocol and nothing of the server: no part of agentao_web but this folder is used.
"""

from agentao_web.client.client import Client
from agentao_web.client.errors import ApiError
from agentao_web.client.errors import ClientError
from agentao_web.client.errors import ConnectionLost
from agentao_web.client.errors import Forbidden
from agentao_web.client.errors import InvalidRequest
from agentao_web.client.errors import NotFound
from agentao_web.client.errors import NotOurs
from agentao_web.client.errors import QuestionClosed
from agentao_web.client.errors import SessionBusy
from agentao_web.client.errors import TooLarge
from agentao_web.client.errors import TooMany
from agentao_web.client.errors import TurnFailed
from agentao_web.client.errors import Unauthorized
from agentao_web.client.errors import Unavailable
from agentao_web.client.events import AskUser
from agentao_web.client.events import Done
from agentao_web.client.events import End
from agentao_web.client.events import Event
from agentao_web.client.events import Failed
from agentao_web.client.events import Gap
from agentao_web.client.events import Question
from agentao_web.client.events import QuestionOver
from agentao_web.client.events import Text
from agentao_web.client.events import Thinking
from agentao_web.client.events import ToolComplete
from agentao_web.client.events import ToolConfirmation
from agentao_web.client.events import ToolOutput
from agentao_web.client.events import ToolResult
from agentao_web.client.events import ToolStart
from agentao_web.client.events import TurnBegin
from agentao_web.client.events import TurnQueued
from agentao_web.client.replies import Approve
from agentao_web.client.replies import Reply
from agentao_web.client.turn import Turn

__all__ = [
    "ApiError",
    "Approve",
    "AskUser",
    "Client",
    "ClientError",
    "ConnectionLost",
    "Done",
    "End",
    "Event",
    "Failed",
    "Forbidden",
    "Gap",
    "InvalidRequest",
    "NotFound",
    "NotOurs",
    "Question",
    "QuestionClosed",
    "QuestionOver",
    "Reply",
    "SessionBusy",
    "Text",
    "Thinking",
    "TooLarge",
    "TooMany",
    "ToolComplete",
    "ToolConfirmation",
    "ToolOutput",
    "ToolResult",
    "ToolStart",
    "Turn",
    "TurnBegin",
    "TurnFailed",
    "TurnQueued",
    "Unauthorized",
    "Unavailable",
]
