"""The demo model, driven through a real agent: every command, and no network."""

import json
import logging
import re
import threading
import time

import pytest
from agentao import Agentao
from agentao.cancellation import CancellationToken
from agentao.mcp.registry import InMemoryMCPRegistry
from agentao.skills import SkillManager

from agentao_web.demo import COMMANDS
from agentao_web.demo import DemoModel

#: A safety net for waits between threads, never a measure.
LONG = 20


class Recorder:
    """A transport that writes down what happens and answers as it was told."""

    def __init__(self):
        self.events = []
        self.approve = True
        self.answer = "tea"
        self.questions = []
        self.first_word = threading.Event()

    def emit(self, event):
        self.events.append((event.type.value, event.data))
        if event.type.value == "llm_text":
            self.first_word.set()

    def confirm_tool(self, tool_name, description, args):
        return self.approve

    def ask_user(self, question, *, header=None, options=None, multiple=False, allow_custom=True):
        self.questions.append((question, options))
        return self.answer

    def on_max_iterations(self, count, messages):
        return {"action": "stop"}

    def all(self, kind):
        return [data for type_, data in self.events if type_ == kind]

    def words(self):
        return [data["chunk"] for data in self.all("llm_text")]


class Desk:
    """An agent with the demo model, its folder and its recorder."""

    def __init__(self, folder, **pace):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.seen = Recorder()
        self.model = DemoModel(**{"words_per_second": 10_000, **pace}, logger=quiet())
        self.agent = Agentao(
            llm_client=self.model,
            transport=self.seen,
            working_directory=folder,
            mcp_registry=InMemoryMCPRegistry(),
            project_instructions="",
            # Without one of ours agentao copies its bundled skills into the home it saw at
            # import, which is the real one.
            skill_manager=SkillManager(str(folder / "no-skills")),
        )

    def say(self, text, **more):
        """One turn; the recorder is empty before it."""
        self.seen.events.clear()
        return self.agent.chat(text, **more)

    @property
    def turn(self):
        return self.agent.last_turn

    def tools(self):
        return [(data["tool"], data["args"]) for data in self.seen.all("tool_start")]


def quiet():
    logger = logging.Logger("demo-test")
    logger.addHandler(logging.NullHandler())
    return logger


@pytest.fixture
def sit(tmp_path, monkeypatch):
    """Make desks; their agents are closed afterwards."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    desks = []

    def make(**pace):
        desks.append(Desk(tmp_path / "work", **pace))
        return desks[-1]

    yield make
    for desk in desks:
        desk.agent.close()


@pytest.fixture
def desk(sit):
    return sit()


def ask(text, *, model=None, tools=(), before=(), **more):
    """The model's message, without an agent around it."""
    messages = [*before, {"role": "user", "content": text}]
    schemas = [{"type": "function", "function": {"name": name}} for name in tools]
    response = (model or DemoModel(10_000)).chat_stream(messages, schemas, **more)
    return response.choices[0].message


def test_help_lists_every_command(desk):
    answer = desk.say("HELP")
    assert all(command.usage in answer for command in COMMANDS)
    assert "demo model" in answer
    assert re.search(r"tools I was given: .*\bread_file, .*write_file", answer)
    assert desk.turn.is_answer


def test_text_is_streamed_word_by_word(desk):
    answer = desk.say("say one two  three\nfour")
    assert answer == "one two  three\nfour"
    assert desk.seen.words() == ["one ", "two  ", "three\n", "four"]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("use stock", {}),
        ('use stock {"item": "tea", "tool": 1}', {"item": "tea", "tool": 1}),
    ],
)
def test_use_calls_any_tool(text, arguments):
    (call,) = ask(text, tools=["stock"]).tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("stock", arguments)


@pytest.mark.parametrize("text", ["use stock {", "use stock {1}", "use stock {'a': 1}"])
def test_use_needs_json(text):
    message = ask(text, tools=["stock"])
    assert not message.tool_calls and "arguments look like" in message.content


def test_use_of_a_tool_that_is_not_there():
    assert "was not given" in ask("use stock").content


@pytest.mark.parametrize("text", ["list files", "list", "List files in .", "list ."])
def test_list_calls_the_tool_and_tells_the_entries(desk, text):
    (desk.folder / "notes.txt").write_text("hello")
    answer = desk.say(text)
    assert desk.tools() == [("list_directory", {"directory_path": "."})]
    assert "notes.txt" in answer


def test_list_takes_a_folder(desk):
    (desk.folder / "docs").mkdir()
    assert desk.say("list docs") == "The folder docs is empty."


def test_read_really_reads(desk):
    (desk.folder / "notes.txt").write_text("first line\nsecond line\n")
    answer = desk.say("read notes.txt")
    assert desk.tools() == [("read_file", {"file_path": "notes.txt"})]
    assert answer == "I read notes.txt (2 lines). It begins:\n\n> first line\n> second line"
    assert desk.turn.tool_count == 1


def test_read_says_when_a_file_is_empty_or_missing(desk):
    (desk.folder / "empty.txt").write_text("")
    assert "It is empty." in desk.say("read empty.txt")
    answer = desk.say("read the file nowhere.txt")
    assert answer.startswith("The tool read_file failed;")
    assert "nowhere.txt does not exist" in answer


def test_search_finds_lines_and_says_when_there_are_none(desk):
    (desk.folder / "notes.txt").write_text("a Needle here\n")
    assert "a Needle here" in desk.say("search for needle")
    assert desk.tools()[0][1]["pattern"] == "needle"
    assert desk.say("search nothing-like-it") == 'I found no line with "nothing-like-it".'


@pytest.mark.parametrize("text", ["write a.txt: hello there", "write a.txt hello there"])
def test_write_writes_when_it_is_approved(desk, text):
    answer = desk.say(text)
    assert (desk.folder / "a.txt").read_text() == "hello there"
    assert answer.startswith("Done.")
    assert desk.seen.all("tool_confirmation")


def test_write_keeps_long_content_whole(desk):
    """The pattern sees only the head of a message; the file gets all of it."""
    content = "word " * 2_000 + "end"
    desk.say(f"write a.txt: {content}")
    assert (desk.folder / "a.txt").read_text() == content


def test_a_refused_write_is_told_and_leaves_no_file(desk):
    desk.seen.approve = False
    answer = desk.say("write a.txt: hello")
    assert not (desk.folder / "a.txt").exists()
    assert answer.startswith("The tool write_file was refused;")
    assert "not approved" in answer
    assert "Do not retry" not in answer


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("ask me Tea or coffee? tea, coffee or water", "Tea or coffee?", "tea coffee water"),
        ("ask me What now?", "What now?", None),
        ("ask me anything", "anything", None),
    ],
)
def test_ask_me_asks_and_hears_the_answer(desk, text, question, options):
    assert desk.say(text) == 'You answered "tea". Thank you!'
    assert desk.seen.questions == [(question, options and options.split())]


def test_an_answer_nobody_gave_is_not_called_an_answer(desk):
    desk.seen.answer = "[ask_user: not available in non-interactive mode]"
    assert desk.say("ask me Anyone?").startswith("I asked, but got no answer.")


def test_thinking_is_streamed_before_the_answer(desk):
    answer = desk.say("think about the sea.")
    kinds = [kind for kind, _ in desk.seen.events if kind in ("thinking", "llm_text")]
    assert kinds.count("thinking") > 1
    assert kinds == sorted(kinds, reverse=True)
    assert "the sea" in "".join(data["text"] for data in desk.seen.all("thinking"))
    assert "the sea" in answer


def test_take_lasts_as_long_as_it_says(sit):
    desk = sit(slow_gap=0.5)
    start = time.monotonic()
    assert desk.say("take 1 second") == "tick tock done."
    assert time.monotonic() - start > 0.9


@pytest.mark.parametrize("text", ["take long", "take 600 seconds"])
def test_a_cancel_ends_a_slow_answer_in_the_middle_of_a_wait(sit, text):
    """The next word is a minute away, so only a wait that can be woken ends in time."""
    desk = sit(slow_gap=60)
    token = CancellationToken()
    turn = threading.Thread(target=desk.say, args=(text,), kwargs={"cancellation_token": token})
    turn.start()
    assert desk.seen.first_word.wait(LONG)
    token.cancel("stop")
    turn.join(LONG)
    assert not turn.is_alive()
    assert desk.turn.status == "cancelled"
    assert desk.turn.text == "tick "
    assert desk.say("say still here") == "still here"


def test_a_cancel_before_the_first_word_leaves_no_word_and_no_tool():
    token, told = CancellationToken(), []
    token.cancel("stop")
    message = ask(
        "read a", tools=["read_file"], on_text_chunk=told.append, cancellation_token=token
    )
    assert (message.content, message.tool_calls, told) == (None, None, [])


def test_the_model_lets_go_of_the_token():
    gone = []

    class Token:
        def add_done_callback(self, fn):
            return lambda: gone.append(fn)

    ask("say hello", cancellation_token=Token())
    assert len(gone) == 1


def test_fail_is_a_provider_failure_without_retries(desk):
    answer = desk.say("fail")
    assert desk.turn.incomplete_reason == "llm_error"
    assert "asked to fail" in answer
    assert not desk.seen.all("llm_retry")
    assert len(desk.seen.all("llm_call_started")) == 1
    assert desk.say("say back again") == "back again"


def test_silence_is_no_output(desk):
    desk.say("be silent")
    assert desk.turn.incomplete_reason == "no_output"
    assert desk.seen.words() == []


def test_count_counts_number_by_number(desk):
    assert desk.say("count to 5") == "1, 2, 3, 4, 5."
    assert len(desk.seen.words()) == 5


def test_memory_reaches_over_turns(desk):
    assert "Nothing yet" in desk.say("what did I say?")
    desk.say("I like pears")
    desk.say("and plums")
    assert desk.say("what did I say") == 'Just before this you said "and plums".'
    assert desk.say("what did I say first?") == 'First you said "what did I say?".'


def test_anything_else_gets_an_honest_answer_with_a_hint(desk):
    answer = desk.say("Hello, who are you?")
    assert "Hello, who are you?" in answer
    assert "demo model, not a real one" in answer
    assert "I can see 1 message of our conversation" in answer
    assert 'Type "help"' in answer
    assert "3 messages" in desk.say("and now?")


def test_memory_skips_over_tools_between_messages(desk):
    (desk.folder / "notes.txt").write_text("hello")
    desk.say("read notes.txt")
    assert desk.say("what did I say") == 'Just before this you said "read notes.txt".'


def test_pictures_are_mentioned(desk):
    picture = {"data": "aGVsbG8=", "mimeType": "image/png"}
    answer = desk.say("say cheese", images=[picture, picture])
    assert answer == "You sent 2 pictures, which a demo model cannot look at. cheese"
    assert "I read no words from you" in desk.say("", images=[picture])


def test_an_empty_message_does_not_repeat_the_last_command(desk):
    desk.say("count to 2")
    assert "I read no words from you" in desk.say("")


def test_a_missing_tool_is_said_not_called():
    message = ask("read notes.txt", tools=["ask_user"])
    assert message.tool_calls is None
    assert message.content == "I would need the tool read_file for this, but I was not given it."


def test_several_results_are_told_one_by_one():
    calls = [
        {"id": str(number), "type": "function", "function": {"name": name, "arguments": "{}"}}
        for number, name in enumerate(["weather", "write_file"])
    ]
    before = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "sun"},
        {"role": "tool", "tool_call_id": "1", "content": "Error: no room. Try later."},
    ]
    message = ask("<system-reminder>\nnews\n</system-reminder>", before=before)
    assert message.content == (
        "The tool weather gave back:\n\n> sun\n\n"
        'The tool write_file failed; it said "Error: no room".'
    )


def test_reminders_are_not_read():
    reminder = "<system-reminder>\nIt is Monday.\n</system-reminder>\n"
    content = [{"type": "text", "text": f"{reminder}say hi {reminder}"}]
    assert ask(content).content == "hi"


@pytest.mark.parametrize(
    "text",
    [
        "<system-reminder>" * 100_000,
        "list" + " \n" * 100_000 + "x",
        "write " + "a" * 100_000,
        "write a " + ": " * 100_000,
        "ask me " + "or , " * 100_000,
        "take " + "1" * 100_000,
        "what did I say " + " ." * 100_000,
        "x" * 1_000_000,
    ],
)
def test_odd_long_messages_are_answered(text):
    """Patterns and reminder stripping take linear time, so this ends at once."""
    assert ask(text).content


def test_tokens_are_estimated_and_added_up(desk):
    desk.say("say hello")
    (call,) = desk.seen.all("llm_call_completed")
    assert call["prompt_tokens"] == desk.model.total_prompt_tokens > 0
    assert call["completion_tokens"] == desk.model.total_completion_tokens > 0
    assert call["finish_reason"] == "stop"


def test_compaction_gets_an_honest_summary():
    response = DemoModel().chat([{"role": "user", "content": "start " + "x" * 5_000 + " end"}])
    summary = response.choices[0].message.content
    assert summary.startswith("The demo model cannot summarise.")
    assert "Beginning: start" in summary and summary.endswith("end")
    assert len(summary) < 1_000


@pytest.mark.parametrize("pace", [{"words_per_second": 0}, {"slow_gap": 0}])
def test_a_pace_must_be_above_zero(pace):
    with pytest.raises(ValueError, match="above zero"):
        DemoModel(**pace)
