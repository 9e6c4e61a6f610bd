"""What a plain Python function says of itself: its name, what it is for, what it takes.

Knows type hints, docstrings and pydantic; must never know agentao, threads or who calls.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
import sys
import threading
import types
import typing as t
import weakref

import pydantic
import typing_extensions
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from agentao_web.core import clean
from agentao_web.core.names import Principal

#: How many complaints about its arguments the model is told, and how much of each.
_COMPLAINTS: t.Final = 5
_COMPLAINT: t.Final = 300

_NAME: t.Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_OPTIONS: t.Final = "__agentao_tool__"

_F = t.TypeVar("_F", bound=cabc.Callable[..., t.Any])


class ToolError(Exception):
    """Raised by a host's tool: its text is for the model, who reads it as the call's error."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``@tool(…)`` says of a function."""

    name: str | None = None
    read_only: bool = False
    timeout: float | None = None


@t.overload
def tool(function: _F, /) -> _F: ...
@t.overload
def tool(
    *, name: str | None = None, read_only: bool = False, timeout: float | None = None
) -> cabc.Callable[[_F], _F]: ...
def tool(
    function: _F | None = None,
    /,
    *,
    name: str | None = None,
    read_only: bool = False,
    timeout: float | None = None,
) -> _F | cabc.Callable[[_F], _F]:
    """Say more of a function that is to be a tool; it stays the function it was.

    A *read_only* one changes nothing and runs without asking. *timeout* is the seconds the model
    waits for one call, in place of the setting TOOL_TIMEOUT. RuntimeError if it cannot be a tool.
    """
    options = Options(name, read_only, timeout)

    def mark(function: _F) -> _F:
        _check_options(options, function)
        plain: t.Any = function
        if isinstance(plain, staticmethod | classmethod):
            plain = plain.__func__  # The wrapping is gone when the class is asked for it.
        try:
            setattr(plain, _OPTIONS, options)
        except (AttributeError, TypeError):
            raise _no(function, "it takes no attributes; wrap it in a function") from None
        if not _may_be_method(plain):
            # What names a type that comes later in its module is looked at again.
            with contextlib.suppress(_Later):
                describe(plain)
        return function

    return mark if function is None else mark(function)


def _check_options(options: Options, function: t.Any) -> None:
    timeout = options.timeout
    if not isinstance(options.read_only, bool):
        raise _no(function, "read_only= is True or False")
    if timeout is None:
        return
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not math.isfinite(timeout) or timeout <= 0:
        raise _no(function, "timeout= is a number of seconds above 0")


class _Later(RuntimeError):
    """A type hint that cannot be read yet."""


class Description:
    """A function as a tool: ``name``, ``text``, ``schema`` (JSON), ``read_only``, ``timeout``."""

    def __init__(self, function: t.Any, given: _Given) -> None:
        options = _options(function)
        self.name, self.text = given.name, given.text
        self.read_only, self.timeout = options.read_only, options.timeout
        self._principals = [name for name, hint in given.hints.items() if _is_principal(hint)]
        asked = [p for p in given.parameters if p.name not in self._principals]
        self._names = [p.name for p in asked]
        self._positional = [
            (p.name, p.default) for p in given.parameters if p.kind is p.POSITIONAL_ONLY
        ]
        try:
            self._arguments = _arguments(asked, given.hints)
            self.schema = self._arguments.json_schema(schema_generator=_Schema)
        except pydantic.errors.PydanticUndefinedAnnotation as exc:
            raise _later(function, exc.name) from None
        except Exception as exc:
            # Also whatever a type's own schema method raises.
            raise _no(function, f"its hints make no JSON schema: {_first_line(exc)}") from exc
        self._tell_defaults(asked)

    def read(
        self, arguments: cabc.Mapping[str, t.Any], principal: Principal
    ) -> tuple[list[t.Any], dict[str, t.Any]]:
        """How to call the function with what the model gave; ToolError says what is wrong."""
        try:
            found: dict[str, t.Any] = self._arguments.validate_python(dict(arguments))
        except pydantic.ValidationError as exc:
            complaint = self._complaint(exc)
            raise ToolError(complaint) from None
        found.update(dict.fromkeys(self._principals, principal))
        args = [found.pop(name, default) for name, default in self._positional]
        return args, found

    def _complaint(self, exc: pydantic.ValidationError) -> str:
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        told = []
        for error in errors[:_COMPLAINTS]:
            where = ".".join(map(str, error["loc"])) or "arguments"
            told.append(f"{where}: {_WORDS.get(error['type'], error['msg'])}"[:_COMPLAINT])
        if len(errors) > _COMPLAINTS:
            told.append(f"and {len(errors) - _COMPLAINTS} more")
        takes = ", ".join(self._names) or "nothing"
        return f"bad arguments: {'; '.join(told)}. The tool takes: {takes}."

    def _tell_defaults(self, parameters: cabc.Iterable[inspect.Parameter]) -> None:
        for parameter in parameters:
            field = self.schema.get("properties", {}).get(parameter.name)
            if field is None or parameter.default is parameter.empty:
                continue
            # The function's own default is used anyway; one that is no JSON is not shown.
            with contextlib.suppress(ValueError):
                field["default"] = json.loads(to_json(parameter.default, inf_nan_mode="strings"))


_WORDS: t.Final = {"missing": "is missing", "extra_forbidden": "is not known"}


class _Given(t.NamedTuple):
    """All that a Description depends on; two that are equal have the same one."""

    name: str
    text: str
    options: Options
    parameters: tuple[inspect.Parameter, ...]
    hints: dict[str, t.Any]


#: A validator costs some kilobytes and a fraction of a millisecond, and a host may define its
#: functions anew for every principal: one description per piece of code and name is kept.
_described: weakref.WeakKeyDictionary[types.CodeType, dict[str, tuple[_Given, Description]]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()
#: Names of one piece of code: a decorator's wrapper has those of all that it decorates.
_NAMES: t.Final = 256


def describe(function: t.Any) -> Description:
    """*function* as a tool; RuntimeError with the cure if it cannot be one."""
    given = _given(function)
    code = getattr(_inner(function), "__code__", None)
    if code is None:
        return Description(function, given)
    with _lock:
        known = _described.setdefault(code, {}).get(given.name)
    if known is not None and _same(known[0], given):
        return known[1]
    made = Description(function, given)
    with _lock:
        names = _described.setdefault(code, {})
        if len(names) >= _NAMES:
            names.clear()  # A name for every principal: no use in keeping them.
        names[given.name] = (given, made)
    return made


def _same(one: _Given, other: _Given) -> bool:
    try:
        return one == other
    except Exception:
        return False  # A default that cannot be compared, such as an array.


def _given(function: t.Any) -> _Given:
    if isinstance(function, type) or not callable(function):
        raise _no(function, "it is not a function")
    inner = _inner(function)
    for test in (inspect.iscoroutinefunction, inspect.isasyncgenfunction):
        if test(inner):
            raise _no(function, "it is async; write a plain function")
    if inspect.isgeneratorfunction(inner):
        raise _no(function, "it yields; return a list")
    options = _options(function)
    text = inspect.cleandoc(getattr(inner, "__doc__", None) or _class_text(function) or "")
    if not text and sys.flags.optimize > 1:
        raise _no(
            function,
            "`python -OO` drops its docstring, which tells the model what it is for; start Python "
            "with -O at most",
        )
    if not text:
        raise _no(function, "it has no docstring, which tells the model what it is for")
    parameters = tuple(_parameters(function))
    hints = _hints(function, inner, parameters)
    return _Given(_name(function, options), clean.text(text), options, parameters, hints)


def _inner(function: t.Any) -> t.Any:
    """The function with the code and the hints, below partials and methods."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not isinstance(function, type):
        function = type(function).__call__
    return getattr(function, "__func__", function)


def _class_text(function: t.Any) -> str | None:
    return None if inspect.isroutine(function) else type(function).__doc__


def _options(function: t.Any) -> Options:
    while not hasattr(function, _OPTIONS) and isinstance(function, functools.partial):
        function = function.func
    found = getattr(function, _OPTIONS, None)
    return found if isinstance(found, Options) else Options()


def _name(function: t.Any, options: Options) -> str:
    bare = function
    while not hasattr(bare, "__name__") and isinstance(bare, functools.partial):
        bare = bare.func
    name = options.name if options.name is not None else getattr(bare, "__name__", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        cure = "letters, digits, _ and -, at most 64; say tool(name=…)"
        raise _no(function, f"{name!r} is no name for a tool: {cure}")
    return name


def _parameters(function: t.Any) -> cabc.Iterator[inspect.Parameter]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise _no(function, "it does not say what it takes; wrap it in a function") from None
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        bound |= set(function.keywords)
        function = function.func
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise _no(function, f"it takes {parameter}; name every parameter")
        # What a partial has given is not the model's to choose.
        if parameter.name not in bound:
            yield parameter


def _hints(
    function: t.Any, inner: t.Any, parameters: cabc.Iterable[inspect.Parameter]
) -> dict[str, t.Any]:
    names = [parameter.name for parameter in parameters]
    try:
        given = getattr(inner, "__annotations__", {})
        # Of the parameters only: what it returns may be known to the type checker alone.
        wanted = types.SimpleNamespace(__annotations__={n: given[n] for n in names if n in given})
        known = getattr(inspect.unwrap(inner), "__globals__", {})
        found = t.get_type_hints(wanted, globalns=known, include_extras=True)
    except NameError as exc:
        raise _later(function, exc.name) from None
    except Exception as exc:
        raise _no(function, f"its hints cannot be read: {_first_line(exc)}") from exc
    for name in names:
        if name not in found:
            raise _no(function, f"the parameter {name} has no type hint")
    return found


def _arguments(
    parameters: cabc.Iterable[inspect.Parameter], hints: dict[str, t.Any]
) -> pydantic.TypeAdapter[dict[str, t.Any]]:
    """A dict with these keys: no parameter's name is in the way, and no default is copied."""
    fields = {
        p.name: hints[p.name]
        if p.default is p.empty
        else typing_extensions.NotRequired[hints[p.name]]
        for p in parameters
    }
    make: t.Any = typing_extensions.TypedDict
    kind = make("Arguments", fields)
    kind.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic.TypeAdapter(kind)


class _Schema(GenerateJsonSchema):
    """Without titles, which only repeat the names, and without principals."""

    def generate(self, schema: t.Any, mode: t.Any = "validation") -> dict[str, t.Any]:
        made = super().generate(schema, mode)
        made.pop("title", None)
        return made

    def field_title_should_be_set(self, schema: t.Any) -> bool:
        return False

    def dataclass_schema(self, schema: t.Any) -> dict[str, t.Any]:
        if issubclass(schema["cls"], Principal):
            # Else the model could say who is asking.
            raise ValueError("a Principal is passed in only to a parameter that is one itself")
        return super().dataclass_schema(schema)


def _is_principal(hint: t.Any) -> bool:
    if t.get_origin(hint) is t.Annotated:
        return _is_principal(t.get_args(hint)[0])
    if t.get_origin(hint) in (t.Union, types.UnionType):
        return [kind for kind in t.get_args(hint) if kind is not types.NoneType] == [Principal]
    return hint is Principal


def _may_be_method(function: t.Any) -> bool:
    """Whether it is just being defined in a class, so that ``self`` is still to be bound."""
    *_, owner, _name = ("<locals>." + getattr(function, "__qualname__", "")).split(".")
    return owner != "<locals>" and inspect.isfunction(function)


def _no(function: t.Any, why: str) -> RuntimeError:
    return RuntimeError(f"{_place(function)} cannot be a tool: {why}")


def _later(function: t.Any, name: str | None) -> _Later:
    cure = "import or define it at the top of its module"
    return _Later(f"{_place(function)} cannot be a tool: its hints name {name}; {cure}")


def _place(function: t.Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    if name is None:
        return f"a {type(function).__qualname__}"
    return f"{getattr(function, '__module__', '?')}.{name}"


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0] or type(exc).__name__
