"""A model that needs no network and no key: it understands a handful of plain commands.

It takes the place of a real client (`Agentao(llm_client=DemoModel())`) and keeps to the same
contract, so everything around it can be seen at work. It never imports agentao, keeps nothing
between calls but its token totals, and always says that it is a demo. One instance serves one
agent at a time.
"""

import collections.abc as cabc
import dataclasses
import json
import logging
import re
import threading
import types
import typing as t
import uuid

Message = cabc.Mapping[str, t.Any]
Tell = cabc.Callable[[str], object]

#: How much of a message the commands look at; a longer one is recognised by its beginning.
HEAD = 2_000
#: The longest "take N seconds" and "count to N".
LONGEST_WAIT = 600
HIGHEST_COUNT = 1_000
#: Four characters a token is the usual rule of thumb for English.
CHARACTERS_PER_TOKEN = 4

_PIECE = re.compile(r"\S{1,60}\s*|\s+")
_FAILED = re.compile(r"Error[^:\n]{0,80}:|Tool (?:call|execution) |\[Operation Cancelled")
_REFUSED = re.compile(r"Tool execution (?:declined|denied|blocked)")


class DemoFailure(RuntimeError):
    """The demo model was asked to fail, as a provider would."""


class Token(t.Protocol):
    """What the model asks of a cancellation token."""

    def add_done_callback(self, fn: cabc.Callable[[], None], /) -> cabc.Callable[[], None]: ...


@dataclasses.dataclass(frozen=True)
class Talk:
    """What the model sees when it answers one message."""

    text: str
    images: int
    #: What the user said before, oldest first.
    earlier: tuple[str, ...]
    #: Messages of the user and of the model, this one included.
    seen: int
    tools: frozenset[str]
    slow_gap: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer: thoughts, then words, then perhaps a tool."""

    text: str = ""
    thoughts: str = ""
    tool: str = ""
    arguments: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    #: Seconds between two words; None is the model's own pace.
    gap: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a tool gave back, next to what it was called with."""

    tool: str
    arguments: cabc.Mapping[str, t.Any]
    text: str


class Command(t.NamedTuple):
    """One row of what the model understands."""

    usage: str
    pattern: re.Pattern[str]
    answer: cabc.Callable[[re.Match[str], Talk], Reply]


class DemoModel:
    """Answers a few commands word by word, and stops at once when the turn is cancelled.

    *slow_gap* is the pause between two words of "take N seconds".
    """

    def __init__(
        self,
        words_per_second: float = 30,
        *,
        slow_gap: float = 0.5,
        logger: logging.Logger | None = None,
    ) -> None:
        if words_per_second <= 0 or slow_gap <= 0:
            raise ValueError("words_per_second and slow_gap must be above zero")
        self.model = "demo"
        self.api_key = ""
        self.base_url = ""
        self.temperature = 0.0
        self.max_tokens = 4_096
        self.logger = logger or logging.getLogger(__name__)
        self.total_prompt_tokens = 0
        self.total_completion_tokens = 0
        self.total_cache_read_tokens = 0
        self.total_cache_creation_tokens = 0
        self.total_reasoning_tokens = 0
        self._gap = 1 / words_per_second
        self._slow_gap = slow_gap

    def chat_stream(
        self,
        messages: cabc.Sequence[Message],
        tools: cabc.Sequence[Message] | None = None,
        max_tokens: int | None = None,
        on_text_chunk: Tell | None = None,
        cancellation_token: Token | None = None,
        *,
        on_reasoning_chunk: Tell | None = None,
        **_: object,
    ) -> types.SimpleNamespace:
        """Answer the end of *messages*, telling each word as it comes."""
        reply = _reply(messages, tools or (), self._slow_gap)
        gap = self._gap if reply.gap is None else reply.gap
        stop = threading.Event()
        # A token that is cancelled already calls back at once.
        forget = cancellation_token.add_done_callback(stop.set) if cancellation_token else None
        try:
            thoughts = _tell(reply.thoughts, gap, on_reasoning_chunk, stop)
            text = _tell(reply.text, gap, on_text_chunk, stop)
        finally:
            if forget is not None:
                forget()
        said = Reply(text, thoughts) if stop.is_set() else reply
        return self._response(said, _size(messages, tools or ()))

    def chat(
        self,
        messages: cabc.Sequence[Message],
        tools: cabc.Sequence[Message] | None = None,
        max_tokens: int | None = None,
        **_: object,
    ) -> types.SimpleNamespace:
        """Stand in for the summary agentao asks for when a conversation gets too long."""
        text = _words(messages[-1].get("content")) if messages else ""
        summary = (
            "The demo model cannot summarise. It kept the beginning and the end only.\n"
            f"Beginning: {_short(text, 400)}\nEnd: {text[-400:].strip()}"
        )
        return self._response(Reply(summary), _size(messages, tools or ()))

    def _response(self, said: Reply, asked: int) -> types.SimpleNamespace:
        """What agentao reads from a provider; counts the tokens on the way."""
        calls = [_call(said.tool, said.arguments)] if said.tool else None
        message = types.SimpleNamespace(
            role="assistant",
            content=said.text or None,
            tool_calls=calls,
            reasoning_content=said.thoughts or None,
        )
        finish = "tool_calls" if calls else "stop"
        answered = said.text + said.thoughts + json.dumps(dict(said.arguments))
        usage = _usage(asked, len(answered))
        self.total_prompt_tokens += usage.prompt_tokens
        self.total_completion_tokens += usage.completion_tokens
        return types.SimpleNamespace(
            model=self.model,
            choices=[types.SimpleNamespace(message=message, finish_reason=finish)],
            usage=usage,
        )


def _tell(text: str, gap: float, tell: Tell | None, stop: threading.Event) -> str:
    """Tell *text* word by word; return as much of it as was told before *stop*."""
    said: list[str] = []
    for piece in _PIECE.findall(text):
        if stop.wait(gap if said else 0):
            break
        said.append(piece)
        if tell is not None:
            tell(piece)
    return "".join(said)


def _call(tool: str, arguments: cabc.Mapping[str, t.Any]) -> types.SimpleNamespace:
    function = types.SimpleNamespace(name=tool, arguments=json.dumps(dict(arguments)))
    return types.SimpleNamespace(
        id=f"demo-{uuid.uuid4().hex[:12]}", type="function", function=function
    )


def _usage(asked: int, answered: int) -> types.SimpleNamespace:
    prompt = max(1, asked // CHARACTERS_PER_TOKEN)
    completion = max(1, answered // CHARACTERS_PER_TOKEN)
    return types.SimpleNamespace(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
    )


def _size(messages: cabc.Sequence[Message], tools: cabc.Sequence[Message]) -> int:
    """About how many characters a provider would have been sent; pictures are not counted."""
    texts = sum(len(_raw(message.get("content"))) for message in messages)
    calls = sum(len(str(message.get("tool_calls") or "")) for message in messages)
    return texts + calls + sum(len(str(tool)) for tool in tools)


# --- Reading the conversation ---------------------------------------------------------------


def _blocks(content: object) -> list[Message]:
    """The blocks of a list-typed content, such as a text with pictures."""
    if not isinstance(content, list):
        return []
    return [block for block in content if isinstance(block, dict)]


def _raw(content: object) -> str:
    if isinstance(content, str):
        return content
    texts = [block.get("text") for block in _blocks(content) if block.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str))


def _words(content: object) -> str:
    """The text of a message without the reminders agentao adds to it.

    By hand and not with a regular expression: many openings without an end would make that
    quadratic.
    """
    text, kept, at = _raw(content), list[str](), 0
    while (start := text.find("<system-reminder>", at)) >= 0:
        end = text.find("</system-reminder>", start)
        if end < 0:
            break
        kept.append(text[at:start])
        at = end + len("</system-reminder>")
    return "".join([*kept, text[at:]]).strip()


def _images(content: object) -> int:
    return sum("image" in str(block.get("type")) for block in _blocks(content))


def _heard(message: Message) -> bool:
    """Whether a message carries anything of a person or a model, not only reminders."""
    content = message.get("content")
    return bool(_words(content) or _images(content))


def _reply(
    messages: cabc.Sequence[Message], tools: cabc.Sequence[Message], slow_gap: float
) -> Reply:
    """Answer what came last: the results of tools, or something a person said."""
    start = len(messages)
    while start and messages[start - 1].get("role") == "user":
        start -= 1
    asked = [message for message in messages[start:] if _heard(message)]
    results = _results(messages[:start])
    if results and not asked:
        return Reply("\n\n".join(map(_about, results)))
    return _obey(_talk(messages, asked, tools, slow_gap))


def _talk(
    messages: cabc.Sequence[Message],
    asked: cabc.Sequence[Message],
    tools: cabc.Sequence[Message],
    slow_gap: float,
) -> Talk:
    content = asked[-1].get("content") if asked else ""
    spoken = [m for m in messages if m.get("role") in ("user", "assistant") and _heard(m)]
    users = [_words(m.get("content")) for m in spoken if m.get("role") == "user"]
    return Talk(
        text=_words(content),
        images=_images(content),
        earlier=tuple(users[:-1] if asked else users),
        seen=len(spoken),
        tools=frozenset(str(tool.get("function", {}).get("name")) for tool in tools),
        slow_gap=slow_gap,
    )


def _results(messages: cabc.Sequence[Message]) -> list[Result]:
    """The tool results at the end, if that is what comes last."""
    start = len(messages)
    while start and messages[start - 1].get("role") == "tool":
        start -= 1
    if start == len(messages) or not start:
        return []
    asked = messages[start - 1].get("tool_calls") or ()
    calls = {call.get("id"): call.get("function", {}) for call in asked}
    return [_result(message, calls) for message in messages[start:]]


def _result(message: Message, calls: cabc.Mapping[str, Message]) -> Result:
    call = calls.get(str(message.get("tool_call_id")), {})
    try:
        arguments = json.loads(call.get("arguments") or "{}")
    except ValueError:
        arguments = {}
    name = call.get("name") or message.get("name") or "tool"
    return Result(
        tool=str(name),
        arguments=arguments if isinstance(arguments, dict) else {},
        text=_words(message.get("content")),
    )


def _short(text: str, length: int) -> str:
    """*text* on one line, cut to *length* characters."""
    line = " ".join(text[: 2 * length].split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _quote(lines: cabc.Sequence[str], most: int = 8) -> str:
    quoted = [f"> {line[:160]}" for line in lines[:most]]
    if len(lines) > most:
        quoted.append(f"… and {len(lines) - most} more lines.")
    return "\n".join(quoted)


# --- What it says about a tool's result -------------------------------------------------------


def _about(result: Result) -> str:
    if _FAILED.match(result.text):
        verdict = "was refused" if _REFUSED.match(result.text) else "failed"
        reason = _short(result.text.split(". ", 1)[0], 160)
        return f'The tool {result.tool} {verdict}; it said "{reason}".'
    return RESULTS.get(result.tool, _about_any)(result)


def _about_any(result: Result) -> str:
    if not result.text:
        return f"The tool {result.tool} gave nothing back."
    return f"The tool {result.tool} gave back:\n\n{_quote(result.text.splitlines())}"


def _about_file(result: Result) -> str:
    if not result.text.startswith("File: "):
        return _about_any(result)
    header, _, *numbered = result.text.splitlines()
    lines = [line.partition("\t")[2] or line for line in numbered]
    name = header.removeprefix("File: ")
    if not any(lines):
        return f"I read {name}. It is empty."
    name = name.replace("(1 lines)", "(1 line)")
    return f"I read {name}. It begins:\n\n{_quote(lines)}"


def _about_folder(result: Result) -> str:
    entries = result.text.splitlines()[2:]
    folder = result.arguments.get("directory_path") or "."
    if not entries:
        return "There are no files yet." if folder == "." else f"The folder {folder} is empty."
    where = "Here" if folder == "." else f"In the folder {folder}"
    return f"{where} I found:\n\n{_quote(entries, most=20)}"


def _about_search(result: Result) -> str:
    header, *found = [line for line in result.text.splitlines() if line] or [""]
    if not found:
        return f'I found no line with "{_short(str(result.arguments.get("pattern")), 60)}".'
    return f"{header}\n\n{_quote(found)}"


def _about_write(result: Result) -> str:
    return f"Done. {_short(result.text, 160)}."


def _about_answer(result: Result) -> str:
    # In square brackets it is agentao or the host speaking: nobody answered.
    if not result.text or (result.text[0], result.text[-1]) == ("[", "]"):
        return f"I asked, but got no answer. {_short(result.text, 160)}".rstrip()
    return f'You answered "{_short(result.text, 200)}". Thank you!'


RESULTS: dict[str, cabc.Callable[[Result], str]] = {
    "read_file": _about_file,
    "list_directory": _about_folder,
    "search_file_content": _about_search,
    "write_file": _about_write,
    "ask_user": _about_answer,
}


# --- The commands -----------------------------------------------------------------------------


def _obey(talk: Talk) -> Reply:
    reply = _understand(talk)
    if not talk.images or not reply.text:
        return reply
    pictures = "1 picture" if talk.images == 1 else f"{talk.images} pictures"
    note = f"You sent {pictures}, which a demo model cannot look at. "
    return dataclasses.replace(reply, text=note + reply.text)


def _understand(talk: Talk) -> Reply:
    head = talk.text[:HEAD]
    for command in COMMANDS:
        if match := command.pattern.fullmatch(head):
            return command.answer(match, talk)
    return _chat(talk)


def _chat(talk: Talk) -> Reply:
    heard = f'You said "{_short(talk.text, 60)}".' if talk.text else "I read no words from you."
    seen = "1 message" if talk.seen == 1 else f"{talk.seen} messages"
    return Reply(
        f"{heard} I am a demo model, not a real one, and know only a handful of words; "
        f'I can see {seen} of our conversation. Type "help" to see what I can do.'
    )


def _rest(match: re.Match[str], talk: Talk, group: int) -> str:
    """A last group in full: the pattern has only seen the head of a long message."""
    return talk.text[match.start(group) :]


def _name(text: str) -> str:
    return text.strip().strip("\"'`")


def _use(talk: Talk, lead: str, tool: str, /, **arguments: t.Any) -> Reply:
    if tool not in talk.tools:
        return Reply(f"I would need the tool {tool} for this, but I was not given it.")
    return Reply(lead, tool=tool, arguments=arguments)


def _help(match: re.Match[str], talk: Talk) -> Reply:
    lines = "\n".join(f"- {command.usage}" for command in COMMANDS)
    tools = f"The tools I was given: {', '.join(sorted(talk.tools))}.\n\n" if talk.tools else ""
    return Reply(
        "I am a demo model: no network, no key, and no understanding beyond these:\n\n"
        f"{lines}\n\n{tools}Anything else gets a short, friendly answer."
    )


def _list(match: re.Match[str], talk: Talk) -> Reply:
    folder = _name(match[1] or "") or "."
    lead = "Let me look at the files." if folder == "." else f"Let me look into {folder}."
    return _use(talk, lead, "list_directory", directory_path=folder)


def _read(match: re.Match[str], talk: Talk) -> Reply:
    name = _name(match[1])
    return _use(talk, f"Let me read {name}.", "read_file", file_path=name)


def _search(match: re.Match[str], talk: Talk) -> Reply:
    pattern = _name(match[1])
    lead = f'Let me search for "{_short(pattern, 60)}".'
    return _use(talk, lead, "search_file_content", pattern=pattern, case_sensitive=False)


def _write(match: re.Match[str], talk: Talk) -> Reply:
    name, content = _name(match[1]), _rest(match, talk, 2)
    return _use(talk, f"Let me write {name}.", "write_file", file_path=name, content=content)


def _ask(match: re.Match[str], talk: Talk) -> Reply:
    question = match[1].strip()
    options = [part.strip(" \t\n.") for part in re.split(r",|\bor\b", match[2])]
    options = [option for option in options if option][:10]
    hints = {"options": options} if options else {}
    return _use(talk, "Here is my question.", "ask_user", question=question, **hints)


def _call_any(match: re.Match[str], talk: Talk) -> Reply:
    try:
        arguments = json.loads(_rest(match, talk, 2) or "{}") if match[2] else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return Reply('I could not read that; arguments look like {"name": "value"}.')
    return _use(talk, f"Let me use {match[1]}.", match[1], **arguments)


def _think(match: re.Match[str], talk: Talk) -> Reply:
    about = _short(match[1].rstrip(".!?"), 80)
    return Reply(
        thoughts=(
            f"The user wants me to think about {about}. I am a demo model, so these thoughts "
            "were written beforehand. They show what thinking looks like from outside."
        ),
        text=f"I thought about {about}. A demo model has no opinion, but the thinking was shown.",
    )


def _take(match: re.Match[str], talk: Talk) -> Reply:
    seconds = min(int(match[1] or 30), LONGEST_WAIT)
    beats = max(1, round(seconds / talk.slow_gap))
    ticks = " ".join("tock" if beat % 2 else "tick" for beat in range(beats))
    return Reply(f"{ticks} done.", gap=talk.slow_gap)


def _fail(match: re.Match[str], talk: Talk) -> Reply:
    raise DemoFailure("the demo model was asked to fail, and did")


def _be_silent(match: re.Match[str], talk: Talk) -> Reply:
    return Reply()


def _say(match: re.Match[str], talk: Talk) -> Reply:
    return Reply(_rest(match, talk, 1))


def _count(match: re.Match[str], talk: Talk) -> Reply:
    last = max(1, min(int(match[1]), HIGHEST_COUNT))
    return Reply(", ".join(str(number) for number in range(1, last + 1)) + ".")


def _recall(match: re.Match[str], talk: Talk) -> Reply:
    if not talk.earlier:
        return Reply("Nothing yet: this is the first message of yours that I can see.")
    said = talk.earlier[0] if match[1] else talk.earlier[-1]
    when = "First" if match[1] else "Just before this"
    return Reply(f'{when} you said "{_short(said, 200)}".')


def _row(usage: str, pattern: str, answer: cabc.Callable[[re.Match[str], Talk], Reply]) -> Command:
    return Command(usage, re.compile(pattern, re.IGNORECASE | re.DOTALL), answer)


#: What the model understands, first match first. Each pattern must match the whole (cut) message.
COMMANDS = (
    _row("help", r"help\b.*", _help),
    _row("list files, or list FOLDER", r"list(?:\s+files)?(?:\s+in)?(?:\s+(\S.*))?", _list),
    _row("read NAME", r"read\s+(?:the\s+)?(?:file\s+)?(\S.*)", _read),
    _row("search TEXT", r"search\s+(?:for\s+)?(\S.*)", _search),
    _row("write NAME: CONTENT", r"write\s+([^\s:]+)(?:\s*:\s*|\s+)(\S.*)", _write),
    _row("ask me QUESTION? a, b or c", r"ask\s+me\s+([^?]+\??)(.*)", _ask),
    _row("use TOOL {JSON}", r"use\s+([\w-]{1,64})(?:\s+(\{.*))?", _call_any),
    _row("think about X", r"think\s+about\s+(\S.*)", _think),
    _row(
        "take N seconds (600 at most), or take long",
        r"take\s+(?:(\d{1,9})\s*(?:s|secs?|seconds?)|long)[.!]?",
        _take,
    ),
    _row("fail (as a provider would)", r"fail[.!]?", _fail),
    _row("be silent", r"be\s+silent[.!]?", _be_silent),
    _row("say TEXT", r"say\s+(\S.*)", _say),
    _row("count to N (1000 at most)", r"count\s+to\s+(\d{1,9})[.!]?", _count),
    _row(
        "what did I say, or what did I say first",
        r"what\s+did\s+I\s+say(?:\s+(first))?\s*[.!?]*",
        _recall,
    ),
)
