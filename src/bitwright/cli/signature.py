"""A record of options as the signature that typer reads, and what typer read as that record."""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import typer
from typer.models import ArgumentInfo

from bitwright.collector import uncollected
from bitwright.errors import Terminated, UsageError
from bitwright.terminal import Terminal

Record = TypeVar("Record")
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr")]


def argument(metavar: str, text: str, default: Any = MISSING) -> Any:
    """A field of a record that has its place in the call."""
    made = typer.Argument(metavar=metavar, help=text, show_default=False)
    return field(default=default, metadata={"typer": lambda _: made})


def option(
    text: str, default: Any = None, panel: str | None = None, *, metavar: str | None = None, flag: str | None = None
) -> Any:
    """A field of a record that is named in the call, by its own name unless there is another flag."""

    def made(name: str) -> Any:
        return typer.Option(flag or f"--{name.replace('_', '-')}", help=text, rich_help_panel=panel, metavar=metavar)

    return field(default=default, metadata={"typer": made})


@dataclass(frozen=True)
class Call:
    """What was typed behind a verb: a record of options and of groups of options, whose docstring is the verb's help.

    What the verb does is the function of its name in the module of its name, which is imported when it is called.
    """

    begins: ClassVar[str] = "Loading PyTorch"
    """What the terminal says while that module is imported; nothing if empty."""

    shared: ClassVar[bool] = False
    """Whether processes that ``torchrun`` started share the work; of others the first one alone does it."""

    @classmethod
    def verb(cls) -> str:
        """The verb's name: ``quantize`` of ``QuantizeCall``."""
        return cls.__name__.removesuffix("Call").lower()

    def check(self) -> None:
        """Refuses what can be known to be wrong before PyTorch is loaded."""


def command(kind: type[Call]) -> Callable[..., None]:
    """The function of a verb that typer takes: its parameters are the record's options, and ``--json``."""

    def run(*, as_json: bool, **given: Any) -> None:
        call = make_record(kind, given)
        other = "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0"
        if other and not call.shared:
            return
        try:
            with Terminal(as_json=as_json, silent=other) as terminal:
                _check_named(kind, given)
                with _imports_stay(f"bitwright.cli.{call.verb()}"):
                    call.check()
                    if call.begins:
                        terminal.begin(call.begins)
                    module = importlib.import_module(f"bitwright.cli.{call.verb()}")
                getattr(module, call.verb())(call, terminal)
        except Terminated as told:  # typer would end it as it ends any interruption
            raise typer.Exit(told.exit_code) from None

    json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    parameters = [*parameters_of(kind), json]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = kind.verb(), kind.__doc__
    return run


@contextmanager
def _imports_stay(module: str) -> Iterator[None]:
    """While inside, the first time, nothing is looked through for cycles; what is there at the end never is.

    PyTorch and what it imports are hundreds of thousands of objects that stay, and Python's collector goes through them
    again and again: while they are made, whenever a network has made as many as a quarter of them, and for a second
    when the process ends.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    with uncollected():
        yield
        gc.freeze()
        atexit.register(gc.freeze)


def _check_named(kind: type[Call], given: dict[str, Any]) -> None:
    """An argument that is there but empty is most often a variable of the shell that is not set.

    Raises:
        UsageError: one is empty.
    """
    for each in parameters_of(kind):
        (how,), value = each.annotation.__metadata__, given[each.name]
        texts = value if isinstance(value, list) else [value]
        if isinstance(how, ArgumentInfo) and any(isinstance(text, str) and not text.strip() for text in texts):
            said = how.help or ""
            raise UsageError(f"Expected {how.metavar}, found an empty text. Name one: {said[:1].lower()}{said[1:]}.")


def parameters_of(kind: Any) -> Iterator[inspect.Parameter]:
    """The options of a record in their order, those of its groups in the groups' places."""
    hints: dict[str, Any] = get_type_hints(kind)
    for each in fields(kind):
        hint: Any = hints[each.name]
        if is_dataclass(hint):
            yield from parameters_of(hint)
        else:
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            declared = Annotated[hint, each.metadata["typer"](each.name)]
            yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=declared)


def make_record(kind: type[Record], given: dict[str, Any]) -> Record:
    """The record, and its groups, with the values that typer read.

    Args:
        kind: of the record.
        given: values of all options by name.
    """
    hints: dict[str, Any] = get_type_hints(kind)
    values = {
        each.name: make_record(hints[each.name], given) if is_dataclass(hints[each.name]) else given[each.name]
        for each in fields(kind)  # type: ignore[arg-type]
    }
    return kind(**values)
