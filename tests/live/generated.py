"""A client made by openapi-python-client: prints what it was told. Run with it on the path."""

from __future__ import annotations

import json
import sys
import typing as t

from agentao_web_client import AuthenticatedClient
from agentao_web_client.api.default import answer
from agentao_web_client.api.default import events
from agentao_web_client.api.default import messages
from agentao_web_client.api.default import sessions
from agentao_web_client.api.default import snapshot
from agentao_web_client.api.default import start_turn
from agentao_web_client.models import Accepted
from agentao_web_client.models import Answered
from agentao_web_client.models import Approval
from agentao_web_client.models import Error
from agentao_web_client.models import Event
from agentao_web_client.models import EventPage
from agentao_web_client.models import EventType
from agentao_web_client.models import MessagePage
from agentao_web_client.models import Session
from agentao_web_client.models import SessionPage
from agentao_web_client.models import TurnRequest
from agentao_web_client.models import TurnResult

SID = "python"


def turn(client: AuthenticatedClient, message: str) -> tuple[str, Event]:
    """What a turn said, and its end; whatever it asks is approved."""
    started = start_turn.sync(SID, client=client, body=TurnRequest(message), stream=0)
    assert isinstance(started, Accepted), started
    cursor, text = started.cursor, ""
    while True:
        page = events.sync(SID, client=client, after=cursor)
        assert isinstance(page, EventPage), page
        for event in page.events:
            if event.type_ is EventType.LLM_TEXT:
                text += event.data["chunk"]
            elif event.type_ is EventType.TOOL_CONFIRMATION:
                reply = Approval(approve=True, question_id=event.data["question_id"])
                assert isinstance(answer.sync(SID, client=client, body=reply), Answered)
            elif event.type_ in (EventType.DONE, EventType.ERROR):
                return text, event
        cursor = page.cursor


def main(url: str, token: str) -> dict[str, t.Any]:
    client = AuthenticatedClient(url, token, raise_on_unexpected_status=True, timeout=None)
    with client:
        text, counted = turn(client, "count to 3")
        _, written = turn(client, "write plan.txt: Ship it.")
        waited = start_turn.sync(
            SID, client=client, body=TurnRequest("say so"), stream=0, prefer="wait=50"
        )
        assert isinstance(waited, TurnResult), waited
        refused = start_turn.sync(SID, client=client, body=TurnRequest(" "), stream=0)
        assert isinstance(refused, Error), refused
        page = messages.sync(SID, client=client)
        assert isinstance(page, MessagePage), page
        session = snapshot.sync(SID, client=client)
        assert isinstance(session, Session) and session.turn is None, session
        listed = sessions.sync(client=client, page="")
        assert isinstance(listed, SessionPage), listed
        return {
            "counted": counted.reply,
            "text": text,
            "written": written.data["status"],
            "waited": waited.reply,
            "refused": refused.code,
            "contents": [one.content or one.tool for one in page.messages],
            "listed": [one.session_id for one in listed.sessions],
        }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
