"""``agentao-web chat`` at a terminal and in scripts, against a real server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess

import pytest

from agentao_web import client as api
from agentao_web.client import Client
from tests.client.conftest import log_of
from tests.client.proxy import Fault
from tests.client.proxy import Proxy
from tests.client.terminal import CTRL_C
from tests.client.terminal import CTRL_D
from tests.client.terminal import PROGRAM
from tests.client.terminal import Terminal
from tests.client.terminal import environ
from tests.client.terminal import run
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import token

pytestmark = pytest.mark.live


def where(server: Server, sid: str) -> list[str]:
    return ["--url", server.url, "--session", sid, "--token", token()]


# -- a conversation ----------------------------------------------------------------------------


def test_a_conversation(server: Server, sid: str) -> None:
    with Terminal(*where(server, sid)) as terminal:
        assert f"a new session: {sid}" in terminal.until("\n> ")
        terminal.type("count to 5\n")
        terminal.until(r"1, 2, 3, 4, 5\.\r\n> ")
        terminal.type("list files\n")
        terminal.until(r'\[list_directory\] directory_path="\." ok, \d+ ms\r\n')
        terminal.until("\n> ")
        terminal.type("fail\n")
        terminal.until(r"Error: The model could not be reached.*\r\n> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_approvals_with_one_key(server: Server, sid: str) -> None:
    with Terminal(*where(server, sid)) as terminal:
        terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: Ship it.\n")
        asked = terminal.until(r"Run it\? \[y\]es, \[n\]o, \[t\]his turn, this \[s\]ession: ")
        assert 'content="Ship it."' in asked and f'file_path="{sid}.txt"' in asked
        terminal.type("what\n")
        terminal.until(r"Run it\?.*: ")
        terminal.type("n\n")
        terminal.until(r"denied, \d+ ms")
        terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: Ship it.\n")
        terminal.until(r"Run it\?.*: ")
        terminal.type("y\n")
        assert "wrote" in terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: Ship it again.\n")
        terminal.until(r"Run it\?.*: ")
        terminal.type("s\n")
        assert "wrote" in terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: And again.\n")
        assert "Run it?" not in terminal.until("\n> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_what_was_typed_before_a_question_is_no_answer(server: Server, sid: str) -> None:
    """A model that makes people type ahead must not get its tool approved by that."""
    with Terminal(*where(server, sid)) as terminal:
        terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: x\ny\ny\n")
        terminal.until(r"Run it\?.*: ")
        terminal.type("n\n")
        assert "denied" in terminal.until("\n> ")


def test_a_choice_by_number_or_text(server: Server, sid: str) -> None:
    with Terminal(*where(server, sid)) as terminal:
        for said, taken in (("2", "blue"), ("green", "green")):
            terminal.until("> ")
            terminal.type("ask me Which colour? red or blue\n")
            asked = terminal.until(r"Answer \(number, or text\): ")
            assert "1. red" in asked and "2. blue" in asked
            terminal.type(f"{said}\n")
            terminal.until(taken)


def test_ctrl_c_stops_the_turn_and_the_next_leaves(
    server: Server, client: Client, sid: str
) -> None:
    with Terminal(*where(server, sid)) as terminal:
        terminal.until("\n> ")
        terminal.type("take 60 seconds\n")
        terminal.until("tick")
        terminal.type(CTRL_C)
        terminal.until(r"\(cancelled: cancelled_by_user\)\r\n> ")
        terminal.type("say still here\n")
        terminal.until(r"\nstill here\r\n> ")
        terminal.until(r"\(Ctrl-C again, or Ctrl-D, to leave\)\r\n> ", press=CTRL_C)
        assert terminal.end(press=CTRL_C) == 130
    assert client.session(sid)["state"] == "idle"


def test_ctrl_c_right_behind_a_message_stops_it_too(server: Server, sid: str) -> None:
    """It may arrive when nothing is read any more, and the turn has not begun."""
    with Terminal(*where(server, sid)) as terminal:
        terminal.until("\n> $")
        for _ in range(3):
            terminal.type("take 60 seconds\n")
            terminal.until("seconds\r\n")
            terminal.until(r"\(cancelled: cancelled_by_user\)|Ctrl-C again", press=CTRL_C)
            # A line that was not read yet goes with a Ctrl-C, so two could be one behind the other.
            terminal.until("\n> $")
            terminal.type("say on\n")
            terminal.until("\non\r\n> $")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_ctrl_c_at_a_question_stops_the_turn(server: Server, sid: str) -> None:
    with Terminal(*where(server, sid)) as terminal:
        terminal.until("\n> ")
        terminal.type(f"write {sid}.txt: x\n")
        terminal.until(r"Run it\?.*: ")
        terminal.until(r"\(cancelled: cancelled_by_user\)\r\n> ", press=CTRL_C)
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_two_ctrl_c_leave_a_turn_that_does_not_end(server: Server, sid: str) -> None:
    """The server hangs: the first can do nothing, the second needs nobody."""
    with Proxy(server.port, [Fault("pass"), Fault("stall", 1200)]) as proxy:
        arguments = ["--url", proxy.url, "--session", sid, "--demo"]
        with Terminal(*arguments, "take 60 seconds") as terminal:
            terminal.until("tick")
            proxy.faults += [Fault("mute")] * 99
            terminal.type(CTRL_C)
            eventually(lambda: proxy.connections >= 3, "the first does not stop the turn")
            terminal.type(CTRL_C)
            assert terminal.end() == 130


def test_it_goes_on_where_it_was(server: Server, client: Client, sid: str) -> None:
    client.ask(sid, "say the first thing")
    client.ask(sid, "list files")
    with Terminal(*where(server, sid)) as terminal:
        shown = terminal.until("\n> $")
        assert "> say the first thing\r\nthe first thing\r\n> list files\r\n" in shown
        assert "[list_directory]" in shown
        terminal.type("what did I say first\n")
        terminal.until("the first thing")


def test_a_turn_that_runs_already_is_followed(server: Server, client: Client, sid: str) -> None:
    begun = iter(client.chat(sid, f"write {sid}.txt: x", on_disconnect="continue"))
    while not isinstance(next(begun), api.Question):
        pass
    with Terminal(*where(server, sid)) as terminal:
        terminal.until(r"Run it\?.*: ")
        terminal.type("y\n")
        assert "wrote" in terminal.until("\n> ")
    assert isinstance(list(begun)[-1], api.Done)


# -- scripts -----------------------------------------------------------------------------------


def test_one_message_from_the_command_line_or_a_pipe(server: Server, sid: str) -> None:
    done = run(*where(server, sid), "count to 3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1, 2, 3.\n", "")
    done = run(*where(server, sid), "list files", "--poll")
    assert done.returncode == 0 and "[list_directory]" in done.stderr
    assert "[list_directory]" not in done.stdout
    for extra in ([], ["-"]):
        done = run(*where(server, sid), *extra, input="say from a pipe\n")
        assert (done.returncode, done.stdout) == (0, "from a pipe\n")
    done = run("--url", server.url, "--session", sid, "say hi", AGENTAO_TOKEN=token())
    assert done.stdout == "hi\n"
    assert run("--url", server.url, "--demo", "say hi").stdout == "hi\n"


def test_json_for_scripts(server: Server, sid: str) -> None:
    done = run(*where(server, sid), "--json", input="say é \u202e")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(e["type"], e["seq"], e["data"]) for e in events if e["type"] != "llm_text"] == [
        e for e in log_of(server, sid) if e[0] != "llm_text"
    ]
    assert events[-1]["reply"].startswith("é") and done.stdout.isascii()


def test_how_it_ends(server: Server, client: Client, sid: str) -> None:
    done = run(*where(server, sid), "fail")
    assert done.returncode == 1 and "Error: The model could not be reached" in done.stderr
    done = run(*where(server, sid), "be silent")
    assert done.returncode == 1 and "(incomplete: no_output)" in done.stderr
    assert run(*where(server, sid), input="  ").returncode == 2
    assert run("--url", server.url, "--session", "a/b", "hi").returncode == 2
    assert run("--url", "example.com", "hi").returncode == 2
    assert run("--header", "oops", "hi").returncode == 2
    assert run("--token", "no\nsuch", "hi").returncode == 2
    assert run("--url", "http://[::1", "hi").returncode == 2
    process = subprocess.Popen(
        [*PROGRAM, *where(server, sid), "take 60 seconds"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ(),
    )
    with process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    eventually(lambda: client.session(sid)["state"] == "idle", "the turn is not stopped")


@pytest.mark.parametrize("buffering", ["", "1"])
def test_an_output_that_cannot_be_written(server: Server, sid: str, buffering: str) -> None:
    command = [*PROGRAM, *where(server, sid), "count to 30"]
    env = {**environ(), "PYTHONUNBUFFERED": buffering}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE) == 1 and b"Traceback" not in process.stderr.read()


def test_a_message_that_is_no_text(server: Server, sid: str) -> None:
    done = subprocess.run(
        [*PROGRAM, *where(server, sid)], input=b"\xff\xfe", capture_output=True, env=environ()
    )
    assert done.returncode == 2 and b"not valid UTF-8" in done.stderr


def test_where_nobody_can_be_asked_no_is_the_answer(server: Server, sid: str) -> None:
    done = run(*where(server, sid), f"write {sid}.txt: x")
    assert "nobody is there; --yes approves everything" in done.stderr
    assert "denied" in done.stderr and "wrote" not in done.stdout
    done = run(*where(server, sid), "--yes", f"write {sid}.txt: x")
    assert done.returncode == 0 and "wrote" in done.stdout
    done = run(*where(server, sid), "ask me Which? a or b")
    assert done.returncode == 0 and "Nobody is there" in done.stdout


def test_what_is_wrong_is_said_in_one_line(server: Server, sid: str) -> None:
    done = run("--url", server.url, "--token", "nonsense", "hi")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--token or AGENTAO_TOKEN" in done.stderr and "--demo" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run("--url", f"http://127.0.0.1:{port}", "hi")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Is the server running" in done.stderr
    done = run("--url", server.url + "/elsewhere", "--demo", "hi")
    assert done.returncode == 1 and "prefix" in done.stderr
    done = run(*where(server, sid), input="x" * 2**20)
    assert done.returncode == 1 and "413 payload_too_large" in done.stderr


def test_a_host_login_by_header(server: Server, sid: str) -> None:
    header = f"Authorization: Bearer {token()}"
    done = run("--url", server.url, "--session", sid, "--header", header, "say hi")
    assert (done.returncode, done.stdout) == (0, "hi\n")
