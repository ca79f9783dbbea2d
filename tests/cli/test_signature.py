"""Records of options as signatures, and back."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from bitwright.cli import main
from bitwright.cli.calls import CALLS, QuantizeCall
from bitwright.cli.options import BitOptions, BudgetOptions, GridOptions, ImageOptions, NetworkOptions
from bitwright.cli.signature import Call, argument, make_record, option, parameters_of
from bitwright.errors import UsageError


@dataclass(frozen=True)
class Pair:
    first_one: int = option("The first", 1)
    second: bool = option("The second", False, flag="--other")


@dataclass(frozen=True)
class PairCall(Call):
    """A verb."""

    name: str = argument("NAME", "A name")
    pair: Pair = Pair()
    last: str | None = option("The last", panel="More")


def test_options_of_a_group_stand_in_its_place() -> None:
    assert [p.name for p in parameters_of(PairCall)] == ["name", "first_one", "second", "last"]
    assert next(parameters_of(PairCall)).default is inspect.Parameter.empty


def test_what_typer_reads_comes_back_as_records() -> None:
    seen: list[Any] = []
    app = typer.Typer()

    def verb(**given: Any) -> None:
        seen.append(make_record(PairCall, given))

    verb.__signature__ = inspect.Signature(list(parameters_of(PairCall)))  # type: ignore[attr-defined]
    app.command()(verb)
    for given in (["me"], ["me", "--first-one", "3", "--other", "--last", "x"]):
        assert CliRunner().invoke(app, given).exit_code == 0
    assert seen == [PairCall("me"), PairCall("me", Pair(3, True), "x")]
    assert CliRunner().invoke(app, ["me", "--second"]).exit_code == 2


@pytest.mark.parametrize("given", [["inspect", ""], ["report", "a", " "], ["quantize", "zoo:fashion_cnn", ""]])
def test_an_empty_argument_is_said(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert re.search(
        r"error: Expected (MODEL|RUN\.\.\.|IMAGES), found an empty text\. Name one: [az]", capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", CALLS, ids=lambda k: k.verb())
def test_every_verb_has_its_function(kind: type[Call]) -> None:
    found = getattr(importlib.import_module(f"bitwright.cli.{kind.verb()}"), kind.verb())
    assert get_type_hints(found)[next(iter(inspect.signature(found).parameters))] is kind
    assert len(inspect.getsourcelines(found)[0]) <= 40


def test_no_option_is_declared_twice_in_a_verb() -> None:
    for kind in CALLS:
        names = [p.name for p in parameters_of(kind)]
        assert len(names) == len(set(names)), kind


def test_a_call_made_in_code_has_the_defaults_of_the_command_line() -> None:
    call = QuantizeCall(NetworkOptions("zoo:fashion_cnn", "zoo:fashion"))
    defaults = {p.name: p.default for p in parameters_of(QuantizeCall) if p.default is not inspect.Parameter.empty}
    assert call == make_record(QuantizeCall, {"model": "zoo:fashion_cnn", "images": "zoo:fashion", **defaults})


def test_what_was_said_of_preprocessing_alone() -> None:
    assert ImageOptions(mean="0.5", crop_pct=0.9, skip_unreadable=True).preprocessing == {
        "mean": "0.5",
        "crop_pct": 0.9,
    }
    assert ImageOptions().preprocessing == {}
    assert len(asdict(ImageOptions())) == 11


def test_a_scheme_of_options() -> None:
    bits = BitOptions("16", ["head=w8a8"], grid=GridOptions(granularity="group", group_size=32))
    scheme = bits.scheme("4")
    assert scheme.described_bits() == {"weights": 4, "activations": 16}
    assert (scheme.granularity, scheme.group_size, len(scheme.rules)) == ("group", 32, 1)
    with pytest.raises(UsageError, match="at least 1 as group_size=, found 0"):
        BitOptions(grid=GridOptions(group_size=0)).scheme("4")


def test_steps_that_are_no_numbers() -> None:
    with pytest.raises(UsageError, match=r"300, or 300,500, as steps=, found 'many'"):
        _ = BudgetOptions("many").numbers


def test_a_group_size_without_groups_is_refused() -> None:
    with pytest.raises(UsageError, match="beside --group-size"):
        BitOptions(grid=GridOptions(group_size=7)).scheme("4")
