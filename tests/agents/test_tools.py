"""A host's functions as tools: what they say of themselves, how they are called, how they end."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import itertools
import json
import logging
import threading
import typing as t
import uuid
import weakref
from pathlib import Path

import jsonschema
import pydantic
import pytest
from agentao.cancellation import CancellationToken
from agentao.cancellation import current_cancellation_token

from agentao_web import Principal
from agentao_web import ToolError
from agentao_web import tool
from agentao_web.agents import guards
from agentao_web.agents import tools as tools_module
from agentao_web.agents.build import build_agent
from agentao_web.agents.build import close_agent
from agentao_web.agents.functions import describe
from agentao_web.agents.results import MAX_RESULT
from agentao_web.agents.results import as_text
from agentao_web.agents.tools import Answer
from agentao_web.agents.tools import HostTool
from agentao_web.agents.tools import HostTools
from tests.agents.scripted_llm import ScriptedLLM
from tests.agents.scripted_llm import call
from tests.agents.scripted_llm import say
from tests.agents.test_build import Asked
from tests.patience import PATIENCE

ANN = Principal("shop", "ann")
LOG = logging.getLogger("agentao_web")


def host(*functions: t.Any, timeout: float = PATIENCE, **more: t.Any) -> HostTools:
    return HostTools(lambda principal: functions, timeout=timeout, log=LOG, **more)


def one(function: t.Any, **more: t.Any) -> HostTool:
    (made,) = host(function, **more).made_for(ANN)
    return made


def ok(function: t.Any, **arguments: t.Any) -> str:
    answer = one(function).call(arguments)
    assert answer.status == "ok", answer
    return answer.text


def error(function: t.Any, **arguments: t.Any) -> str:
    answer = one(function).call(arguments)
    assert answer.status == "error", answer
    return answer.text


# -- what a function says of itself -------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Street:
    name: str
    number: int = 1


@dataclasses.dataclass
class Address:
    street: Street
    notes: list[str] = dataclasses.field(default_factory=list)


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


def order(
    number: t.Annotated[int, pydantic.Field(ge=1, description="As on the bill.")],
    colour: Colour = Colour.RED,
    size: t.Literal["s", "l"] | None = None,
    address: Address | None = None,
    *,
    when: datetime.date | None = None,
    tree: Node | None = None,
) -> str:
    """Order something.

    Ask for the number first.
    """
    return repr((number, colour, size, address, when, tree))


def test_the_schema_is_made_of_the_hints() -> None:
    made = one(order)
    assert (made.name, made.description) == (
        "order",
        "Order something.\n\nAsk for the number first.",
    )
    schema = made.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object" and schema["required"] == ["number"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["number"] == {
        "type": "integer",
        "minimum": 1,
        "description": "As on the bill.",
    }
    assert schema["properties"]["colour"]["default"] == "red"
    assert "title" not in schema and json.dumps(schema)


def test_arguments_arrive_as_what_the_hints_say() -> None:
    text = ok(
        order,
        number="7",
        colour="blue",
        size="l",
        address={"street": {"name": "High"}, "notes": ["a"]},
        when="2026-01-02",
        tree={"value": 1, "children": [{"value": 2}]},
    )
    assert text == repr(
        (
            7,
            Colour.BLUE,
            "l",
            Address(Street("High"), ["a"]),
            datetime.date(2026, 1, 2),
            Node(value=1, children=[Node(value=2)]),
        )
    )
    assert ok(order, number=1) == repr((1, Colour.RED, None, None, None, None))


def test_names_that_are_in_the_way_elsewhere() -> None:
    def odd(self: int, schema: int, model_config: int, arguments: int, json: int, copy: int) -> int:
        """Add."""
        return self + schema + model_config + arguments + json + copy

    names = ("self", "schema", "model_config", "arguments", "json", "copy")
    assert one(odd).execute(**dict.fromkeys(names, 2)) == "12"


def test_positional_only_and_keyword_only() -> None:
    def mixed(a: int, b: int = 2, /, c: int = 3, *, d: int = 4) -> list[int]:
        """List them."""
        return [a, b, c, d]

    assert ok(mixed, a=1) == "[1,2,3,4]"
    assert ok(mixed, a=9, b=8, c=7, d=6) == "[9,8,7,6]"


def test_partials_methods_instances_and_wrappers() -> None:
    class Shop:
        def __init__(self, name: str) -> None:
            self.name = name

        @tool(read_only=True)
        def stock(self, item: str) -> str:
            """How many there are."""
            return f"{self.name}: {item}"

        @tool(read_only=True)
        @staticmethod
        def town() -> str:
            """Where it is."""
            return "here"

        @tool(read_only=True)
        @classmethod
        def kind(cls, n: int) -> str:
            """What it is."""
            return cls.__name__ * n

        def __call__(self, item: str) -> str:
            """Buy it."""
            return f"bought {item}"

    def greet(word: str, name: str, mark: str = "!") -> str:
        """Greet."""
        return f"{word} {name}{mark}"

    assert ok(Shop("corner").stock, item="tea") == "corner: tea"
    assert ok(Shop.town) == "here" and ok(Shop.kind, n=2) == "ShopShop"
    assert all(one(f).is_read_only for f in (Shop("x").stock, Shop.town, Shop.kind))
    assert ok(tool(name="buy")(Shop("x")), item="tea") == "bought tea"
    assert ok(functools.partial(greet, "hi"), name="Ann") == "hi Ann!"
    bound = functools.partial(greet, "hi", mark="?")
    assert ok(bound, name="Ann") == "hi Ann?"
    assert "mark" not in one(bound).parameters["properties"]
    assert "mark: is not known" in error(bound, name="Ann", mark="#")
    partly = tool(name="partly", read_only=True)(functools.partial(greet, "hi"))
    assert (one(partly).name, one(partly).is_read_only) == ("partly", True)

    def loud(function: cabc.Callable[..., str]) -> cabc.Callable[..., str]:
        @functools.wraps(function)
        def wrapper(*args: t.Any, **kwargs: t.Any) -> str:
            return function(*args, **kwargs).upper()

        return wrapper

    assert ok(loud(greet), word="hi", name="ann") == "HI ANN!"
    assert one(loud(tool(read_only=True)(greet))).is_read_only


def test_a_default_is_the_functions_own() -> None:
    given = object()

    def f(a: int = 1, b: t.Any = given, c: float = float("nan"), d: t.Any = None) -> bool:
        """Compare."""
        return b is given

    assert ok(f) == "true"
    properties = one(f).parameters["properties"]
    assert (properties["a"]["default"], properties["c"]["default"]) == (1, "NaN")
    assert "default" not in properties["b"] and properties["d"]["default"] is None
    json.dumps(properties, allow_nan=False)


def test_the_decorated_function_stays_what_it_was() -> None:
    @tool
    def double(n: int) -> int:
        """Double it."""
        return 2 * n

    @tool(name="look-up", read_only=True, timeout=3)
    def find() -> None:
        """Find it."""

    assert double(4) == 8
    asking, reading = one(double), one(find)
    assert asking.requires_confirmation and not asking.is_read_only
    assert reading.is_read_only and not reading.requires_confirmation
    assert reading.name == "look-up" and asking.name == "double"


def undocumented(a: int) -> int:
    return a


def unhinted(a) -> int:  # type: ignore[no-untyped-def]
    """Do."""
    return 1


def many(*numbers: int) -> int:
    """Do."""
    return 1


def more(**numbers: int) -> int:
    """Do."""
    return 1


async def later() -> int:
    """Do."""
    return 1


def yields() -> cabc.Iterator[int]:
    """Do."""
    yield 1


def odd_type(a: threading.Lock) -> int:  # type: ignore[valid-type]
    """Do."""
    return 1


def callback(a: cabc.Callable[[], int]) -> int:
    """Do."""
    return 1


def smuggled(a: list[Principal]) -> int:
    """Do."""
    return 1


def nowhere(a: Missing) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Do."""
    return 1


class Call:
    """Do."""

    async def __call__(self) -> int:
        """Do."""
        return 1


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (undocumented, "docstring"),
        (unhinted, "the parameter a has no type hint"),
        (many, r"\*numbers"),
        (more, r"\*\*numbers"),
        (later, "async"),
        (functools.partial(later), "async"),
        (yields, "return a list"),
        (odd_type, "JSON schema"),
        (callback, "JSON schema"),
        (smuggled, "a Principal is passed in only"),
        (nowhere, "its hints name Missing; import"),
        (lambda: 1, "docstring"),
        (Call(), "async"),
        (Call, "not a function"),
        (print, "type hint|does not say|takes|docstring"),
        ("name", "not a function"),
        (None, "not a function"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_with_the_cure(function: t.Any, why: str) -> None:
    with pytest.raises(RuntimeError, match=f"cannot be a tool: .*({why})"):
        host(function).made_for(ANN)


@pytest.mark.parametrize("function", [undocumented, unhinted, many, later, odd_type, smuggled])
def test_the_decorator_says_so_at_once(function: t.Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be a tool"):
        tool(function)


def test_the_decorator_waits_for_types_that_come_later() -> None:
    @tool
    def f(a: Missing) -> int:  # type: ignore[name-defined]  # noqa: F821
        """Do."""
        return 1

    with pytest.raises(RuntimeError, match="its hints name Missing"):
        one(f)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "two words"},
        {"name": ""},
        {"name": "x" * 65},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": "3"},
        {"timeout": True},
        {"read_only": "yes"},
    ],
)
def test_bad_options_are_refused(options: dict[str, t.Any]) -> None:
    def f() -> None:
        """Do."""

    with pytest.raises(RuntimeError, match="cannot be a tool"):
        tool(**options)(f)


@pytest.mark.parametrize(
    "name",
    ["read_file", "Read-File", "run_shell_command", "mcp_x", "agent_y", "plan_save", "web_fetch"],
)
def test_names_of_agentaos_are_taken(name: str) -> None:
    def f() -> None:
        """Do."""

    with pytest.raises(RuntimeError, match="belongs to agentao"):
        host(tool(name=name)(f)).made_for(ANN)


def test_two_of_one_name_are_refused() -> None:
    def f() -> None:
        """Do."""

    with pytest.raises(RuntimeError, match="two tools are called"):
        host(f, f).made_for(ANN)


@pytest.mark.parametrize("returned", [None, 3])
def test_what_is_no_list_is_refused(returned: t.Any) -> None:
    with pytest.raises(RuntimeError, match="not a list"):
        HostTools(lambda principal: returned, timeout=1, log=LOG).made_for(ANN)


def test_a_description_is_made_once_although_the_function_is_made_anew() -> None:
    def tools_for(principal: Principal) -> list[t.Any]:
        def mine(a: int) -> str:
            """Whose."""
            return f"{principal.user} {a}"

        return [mine]

    made = HostTools(tools_for, timeout=PATIENCE, log=LOG)
    ann, bob = (made.made_for(Principal("shop", user))[0] for user in ("ann", "bob"))
    assert ann.parameters is bob.parameters
    assert (ann.call({"a": 1}).text, bob.call({"a": 1}).text) == ("ann 1", "bob 1")


def test_the_same_code_with_other_types_is_described_anew() -> None:
    def make(*shops: str) -> t.Any:
        def visit(shop) -> str:  # type: ignore[no-untyped-def]
            """Go there."""
            return str(shop)

        visit.__annotations__["shop"] = t.Literal[shops]
        return visit

    assert ok(make("a"), shop="a") == "a"
    assert "shop" in error(make("b"), shop="a")


def test_a_name_for_every_principal_is_not_kept_for_ever() -> None:
    def make(name: str) -> t.Any:
        @tool(name=name)
        def mine() -> None:
            """Do."""

        return mine

    first = describe(make("mine_0"))
    assert describe(make("mine_0")) is first
    for n in range(1, 300):
        describe(make(f"mine_{n}"))
    assert describe(make("mine_0")) is not first


def test_nothing_keeps_a_function_alive() -> None:
    def make() -> t.Any:
        def f() -> None:
            """Do."""

        return f

    function = make()
    describe(function)
    seen = weakref.ref(function)
    del function
    gc.collect()
    assert seen() is None


# -- arguments of the model's --------------------------------------------------------------------


def test_bad_arguments_are_named_and_nothing_else() -> None:
    text = error(order, number=0, colour="green", extra="secret", size={"a": "secret"})
    for name in ("number", "colour", "size", "extra: is not known"):
        assert name in text
    assert "The tool takes: number, colour, size, address, when, tree." in text
    assert "secret" not in text and "Traceback" not in text and "pydantic" not in text
    assert "number: is missing" in error(order)


def test_many_bad_arguments_are_told_in_short() -> None:
    text = error(order, number=1, **{"k" * 10_000 + str(n): 1 for n in range(1000)})
    assert len(text) < 3000 and "and 995 more" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_a_number(value: float) -> None:
    def pay(amount: float) -> str:
        """Pay."""
        return str(amount)

    assert "amount" in error(pay, amount=value)


def test_deep_arguments_are_refused_and_hurt_nobody() -> None:
    deep: dict[str, t.Any] = {"value": 1}
    for _ in range(5000):
        deep = {"value": 1, "children": [deep]}
    assert "tree" in error(order, number=1, tree=deep)


def broken(value: int) -> int:
    raise ZeroDivisionError("secret of the host")


def test_a_validator_of_the_hosts_that_breaks_tells_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def f(a: t.Annotated[int, pydantic.AfterValidator(broken)]) -> int:
        """Do."""
        return a

    text = error(f, a=1)
    assert "secret" not in text and "error_id" in text
    assert "secret of the host" in caplog.text


# -- the principal -------------------------------------------------------------------------------


def test_the_principal_is_passed_in_and_is_no_argument() -> None:
    def whoami(who: Principal, n: int = 1, other: Principal | None = None) -> str:
        """Say who."""
        return f"{who.tenant}/{who.user} {other == who}"

    made = one(whoami)
    assert set(made.parameters["properties"]) == {"n"}
    assert made.call({}).text == "shop/ann True"
    forged = made.call({"who": {"tenant": "other", "user": "bob"}})
    assert forged.status == "error" and "who: is not known" in forged.text


def test_tools_for_decides_by_the_principal() -> None:
    def a() -> None:
        """A."""

    def b() -> None:
        """B."""

    made = HostTools(lambda p: [a] if p.user == "ann" else [a, b], timeout=1, log=LOG)
    assert [x.name for x in made.made_for(ANN)] == ["a"]
    assert [x.name for x in made.made_for(Principal("shop", "bob"))] == ["a", "b"]


# -- results -------------------------------------------------------------------------------------


class Loud(str):
    def __str__(self) -> str:
        raise RuntimeError("never asked")

    __len__ = __getitem__ = encode = __str__  # type: ignore[assignment]


class Plain:
    """Has no words of its own."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "done"),
        (True, "true"),
        (7, "7"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (("a", 2), '["a",2]'),
        ({3}, "[3]"),
        (Street("High"), '{"name":"High","number":1}'),
        (Node(value=1), '{"value":1,"children":[]}'),
        (Colour.RED, '"red"'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (decimal.Decimal("1.50"), '"1.50"'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (b"bytes \xff", "bytes \ufffd"),
        (float("nan"), '"NaN"'),
        ([float("inf")], '["Infinity"]'),
        ("lone \ud800", "lone \ufffd"),
        ({1: 2, None: 3}, '{"1":2,"None":3}'),
        (10**500, "1" + "0" * 500),
    ],
)
def test_every_result_is_text(value: t.Any, text: str) -> None:
    assert as_text(value) == text


def test_text_of_an_odd_kind_is_text() -> None:
    assert type(as_text(Loud("loud"))) is str and as_text(Loud("loud")) == "loud"


@pytest.mark.parametrize(
    "value",
    [
        {"a": "\ud800"},
        [b"\xff"],
        Plain(),
        [Plain()],
        print,
        lambda: 1,
        threading.Lock(),
        ValueError("x"),
        range(3),
        1j,
        {"k": {"\udfff", "b"}},
    ],
)
def test_what_is_no_json_is_text_all_the_same(value: t.Any) -> None:
    text = as_text(value)
    text.encode("utf-8")
    assert "0x" not in text


def test_an_endless_or_huge_result_has_an_end() -> None:
    def count() -> t.Any:
        """Count."""
        return itertools.count()

    assert ok(count).endswith(",9999]")
    text = as_text("x" * (3 * MAX_RESULT))
    assert len(text) < MAX_RESULT + 200
    assert text.endswith(f"first {MAX_RESULT} of {3 * MAX_RESULT} characters]")
    assert len(as_text(["x" * (3 * MAX_RESULT)])) < MAX_RESULT + 200
    assert len(as_text(b"x" * (3 * MAX_RESULT))) < MAX_RESULT + 200


def cyclic() -> t.Any:
    """Do."""
    value: list[t.Any] = []
    value.append(value)
    return value


def deep() -> t.Any:
    """Do."""
    value: list[t.Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def wordless() -> t.Any:
    """Do."""

    class Wordless:
        def __str__(self) -> str:
            raise RuntimeError("secret")

    return Wordless()


def odd_keys() -> t.Any:
    """Do."""
    return {frozenset([1]): 1}


def lone_keys() -> t.Any:
    """Do."""
    return {"\ud800": 1}


@pytest.mark.parametrize("function", [cyclic, deep, wordless, odd_keys, lone_keys])
def test_a_result_that_cannot_be_shown_is_no_failure(
    function: t.Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the function did is done: told that it failed, the model would do it twice."""
    text = ok(function)
    assert text.startswith("done, but the result cannot be shown (error_id ")
    assert text[-17:-1] in caplog.text and "secret" not in text


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("secret"),
        SystemExit("secret"),
        KeyboardInterrupt("secret"),
        GeneratorExit("secret"),
        MemoryError("secret"),
        BaseException("secret"),
        StopIteration("secret"),
    ],
)
def test_a_failure_is_an_id_for_the_model_and_a_traceback_for_the_host(
    raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def f() -> None:
        """Do."""
        raise raised

    text = error(f)
    assert text.startswith("the tool failed (error_id ")
    assert "secret" not in text and "Traceback" not in text
    error_id = text[-17:-1]
    (record,) = [r for r in caplog.records if error_id in r.getMessage()]
    assert record.exc_info is not None and record.exc_info[1] is raised


def test_what_was_not_run_is_a_failure() -> None:
    def asynchronous() -> t.Any:
        """Do."""
        return later()

    def lazy() -> t.Any:
        """Do."""
        return (1 / n for n in range(3))

    assert error(asynchronous).startswith("the tool failed (error_id ")
    assert error(lazy).startswith("the tool failed (error_id ")


def test_a_validation_error_of_the_hosts_own_is_a_failure() -> None:
    def f() -> None:
        """Do."""
        Node.model_validate({"value": "secret"})

    assert error(f).startswith("the tool failed (error_id ")


def test_a_tool_error_is_said_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def f(text: str) -> None:
        """Do."""
        raise ToolError(text)

    class Silent(ToolError):
        def __str__(self) -> str:
            raise RuntimeError

    def g() -> None:
        """Do."""
        raise Silent

    assert error(f, text="no such order") == "no such order"
    assert error(f, text="") == "the tool failed"
    assert len(error(f, text="x" * 100_000)) == tools_module.MAX_ERROR
    assert error(g) == "the tool failed"
    assert not caplog.records


# -- the context ---------------------------------------------------------------------------------


class Around:
    """A context that notes what happens in it."""

    def __init__(self, *, broken_exit: bool = False) -> None:
        self.notes: list[str] = []
        self.broken_exit = broken_exit

    @contextlib.contextmanager
    def __call__(self) -> cabc.Iterator[None]:
        self.notes.append("enter")
        try:
            yield
        except BaseException as exc:
            self.notes.append(f"exit {type(exc).__name__}")
            raise
        self.notes.append("exit")
        if self.broken_exit:
            raise RuntimeError("cannot commit")


def test_each_call_has_a_context_of_its_own_ended_before_the_answer() -> None:
    around = Around()

    class Row:
        def __str__(self) -> str:
            around.notes.append("shown")
            return "row"

    def f() -> Row:
        """Do."""
        around.notes.append("call")
        return Row()

    (made,) = host(f, context=around).made_for(ANN)
    around.notes.clear()
    assert made.call({}) == Answer("ok", '"row"')
    assert around.notes == ["enter", "call", "shown", "exit"]


def test_a_failure_goes_through_the_context() -> None:
    around = Around()

    def f(how: str) -> None:
        """Do."""
        raise ToolError("no") if how == "said" else ValueError("no")

    made = one(f, context=around)
    around.notes.clear()
    made.call({"how": "said"})
    made.call({"how": "broken"})
    assert around.notes == ["enter", "exit ToolError", "enter", "exit ValueError"]


def test_a_context_that_cannot_end_is_a_failure_of_the_tool() -> None:
    def f() -> str:
        """Do."""
        return "stored"

    around = Around()
    made = one(f, context=around)
    around.broken_exit = True
    answer = made.call({})
    assert answer.status == "error" and "cannot commit" not in answer.text


def test_the_call_may_ask_whether_its_turn_was_stopped() -> None:
    def f() -> bool:
        """Do."""
        token = current_cancellation_token()
        return token is not None and token.is_cancelled

    assert one(f).call({}, CancellationToken()).text == "false"


# -- the end of a call ---------------------------------------------------------------------------


class Stuck:
    """Functions that run until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)

    def hold(self) -> str:
        """Hold on."""
        self.entered.release()
        assert self.go.wait(PATIENCE)
        self.ended.release()
        return "late"


@pytest.fixture
def stuck() -> cabc.Iterator[Stuck]:
    made = Stuck()
    yield made
    made.go.set()


def until_none_is_left(made: HostTools) -> None:
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if made.left == 0:
            return
        waited.wait(0.01)
    raise AssertionError("still counted")


def test_at_its_deadline_the_model_is_told_and_the_function_runs_on(
    stuck: Stuck, caplog: pytest.LogCaptureFixture
) -> None:
    made = host(stuck.hold, timeout=0.05)
    answer = made.made_for(ANN)[0].call({})
    assert answer == Answer("error", "timed out after 0.05 seconds; it may still take effect")
    assert made.left == 1
    assert "the tool hold runs on" in caplog.text
    stuck.go.set()
    assert stuck.ended.acquire(timeout=PATIENCE)
    until_none_is_left(made)


def test_a_tool_may_have_a_deadline_of_its_own(stuck: Stuck) -> None:
    @tool(timeout=0.05)
    def quick() -> str:
        """Hold on."""
        return stuck.hold()

    assert "timed out after 0.05 seconds" in one(quick, timeout=600).call({}).text


def test_a_deadline_longer_than_threads_can_wait() -> None:
    assert one(tool(timeout=1e300)(order)).call({"number": 1}).status == "ok"


def test_a_stopped_turn_waits_no_longer(stuck: Stuck) -> None:
    made = host(stuck.hold, timeout=600)
    token = CancellationToken()
    answers: list[Answer] = []
    waiting = threading.Thread(target=lambda: answers.append(made.made_for(ANN)[0].call({}, token)))
    waiting.start()
    assert stuck.entered.acquire(timeout=PATIENCE)
    token.cancel("stop")
    waiting.join(PATIENCE)
    assert answers[0].status == "cancelled" and made.left == 1
    stuck.go.set()
    until_none_is_left(made)


def test_the_calls_that_run_on_are_bounded(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "MAX_LEFT_PER_TENANT", 2)
    monkeypatch.setattr(tools_module, "MAX_LEFT", 3)
    made = host(stuck.hold, timeout=0.02)
    tenants = {name: made.made_for(Principal(name))[0] for name in ("a", "b", "c")}
    assert [tenants["a"].call({}).text[:9] for _ in range(3)] == ["timed out"] * 2 + ["not start"]
    assert tenants["b"].call({}).text[:9] == "timed out", "another tenant may"
    assert tenants["c"].call({}).text[:9] == "not start", "until the process is full"
    assert made.left == 3
    stuck.go.set()
    until_none_is_left(made)
    assert tenants["a"].call({}) == Answer("ok", "late")


def test_without_a_thread_to_be_had_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = one(order)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert made.call({"number": 1}).text.startswith("not started")
    assert made.call({"number": 1}).status == "ok"


# -- in an agent ---------------------------------------------------------------------------------


def agent_with(
    workspace: Path, llm: ScriptedLLM, *functions: t.Any, **given: t.Any
) -> tuple[t.Any, Asked]:
    guards.install()
    asked = Asked(given.pop("answer", False))
    made = host(*functions, timeout=given.pop("timeout", PATIENCE)).made_for(ANN)
    agent = build_agent(
        workspace=workspace,
        llm_client=llm,
        logger=logging.Logger("quiet"),
        transport=asked,
        session_id="s",
        extra_tools=made,
        **given,
    )
    return agent, asked


@tool(read_only=True)
def look(n: int = 0) -> str:
    """Look."""
    return f"seen {n}"


def change(n: int = 0) -> str:
    """Change."""
    return f"changed {n}"


@pytest.mark.parametrize(
    ("policy", "answer", "asks", "changed"),
    [
        ("ask", True, 1, True),
        ("ask", False, 1, False),
        ("trusted", False, 0, True),
        ("read-only", True, 0, False),
    ],
)
def test_the_policy_decides_for_tools_that_are_not_read_only(
    tmp_path: Path, policy: str, answer: bool, asks: int, changed: bool
) -> None:
    llm = ScriptedLLM(call("look", n=1), call("change", n=2), say("done"))
    agent, asked = agent_with(tmp_path, llm, look, change, policy=policy, answer=answer)
    assert agent.chat("go") == "done"
    close_agent(agent)
    assert {"look", "change"} <= llm.tool_names
    assert llm.results[0] == "seen 1"
    assert (llm.results[1] == "changed 2") is changed
    assert [name for name, _ in asked.questions] == ["change"] * asks


def test_an_error_is_an_error_for_agentao_too(tmp_path: Path) -> None:
    def refuse() -> None:
        """Refuse."""
        raise ToolError("closed on Sundays")

    def leave() -> None:
        """Leave."""
        raise SystemExit(3)

    llm = ScriptedLLM(call("refuse"), call("leave"), call("look", n="x", m=1), say("done"))
    agent, _ = agent_with(tmp_path, llm, refuse, leave, look, policy="trusted")
    assert agent.chat("go") == "done"
    close_agent(agent)
    assert llm.results[0] == "Error executing refuse: closed on Sundays"
    assert llm.results[1].startswith("Error executing leave: the tool failed (error_id ")
    assert "n:" in llm.results[2] and "m: is not known" in llm.results[2]


def test_calls_of_one_batch_run_side_by_side(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=PATIENCE)

    @tool(read_only=True)
    def left(n: int) -> int:
        """Meet the other."""
        together.wait()
        return n

    @tool(read_only=True)
    def right(n: int) -> int:
        """Meet the other."""
        together.wait()
        return n

    calls = [(name, json.dumps({"n": n})) for n, name in enumerate(("left", "right"))]
    llm = ScriptedLLM({"content": "", "calls": calls}, say("done"))
    agent, _ = agent_with(tmp_path, llm, left, right)
    assert agent.chat("go") == "done"
    close_agent(agent)
    assert llm.results == ["0", "1"]


def test_a_stop_ends_the_turn_although_the_tool_runs_on(tmp_path: Path, stuck: Stuck) -> None:
    llm = ScriptedLLM(call("hold"), say("never"))
    agent, _ = agent_with(tmp_path, llm, stuck.hold, policy="trusted", timeout=600)
    token = CancellationToken()
    turn = threading.Thread(target=lambda: agent.chat("go", cancellation_token=token))
    turn.start()
    assert stuck.entered.acquire(timeout=PATIENCE)
    token.cancel("stop")
    turn.join(PATIENCE)
    assert not turn.is_alive() and agent.last_turn.status == "cancelled"
    stuck.go.set()
    close_agent(agent)
