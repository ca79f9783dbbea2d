"""Tables are computed once for each network, images and settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import dataset, images, prepared
from torch import Tensor, nn

from bitwright.errors import UsageError
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.quant.scheme import Scheme
from bitwright.sensitivity import (
    MEASURES,
    Choices,
    Measure,
    MeasuredLoss,
    OutputDistance,
    QBert,
    Quadratic,
    Table,
    TopEigenvalue,
    Trace,
    predicted_losses,
)
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq

CHOICES = Choices((3, 8), (4,))
ALL: list[Measure] = [
    Trace(probes=3), TopEigenvalue(steps=2), QBert(parts=2, steps=2), Quadratic(), OutputDistance(), MeasuredLoss(),
]  # fmt: skip


def test_every_measure_is_listed_by_its_name() -> None:
    assert {m.name for m in ALL} == set(MEASURES)
    assert all(MEASURES[m.name] is type(m) for m in ALL)


@pytest.mark.parametrize("measure", ALL, ids=lambda m: m.name)
def test_the_second_call_computes_nothing_and_gives_the_same(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    first = predicted_losses(measure, prepared("residual"), dataset(4), CHOICES, Run(), folder)
    assert set(first.weights) == {"stem", "conv", "head"}
    assert all(set(row) == {3, 8} for row in first.weights.values())
    assert bool(first.activations) == (measure.name in {"distance", "loss"})
    assert all(set(row) == {4} for row in first.activations.values())

    def never(*_: object) -> Table:
        raise AssertionError("computed again")

    monkeypatch.setattr(type(measure), "measure", never)
    again = predicted_losses(measure, prepared("residual"), dataset(4), CHOICES, Run(), folder)
    assert again == first
    assert len(list(folder.iterdir())) == 1


class Alike(Optq):
    """Another stage with the same settings."""

    kind: ClassVar[str] = "test-alike"


def test_whatever_changes_the_numbers_changes_the_key(tmp_path: Path) -> None:
    base = (Trace(probes=2), prepared("residual"), dataset(4), CHOICES, Run())
    others = [
        (Trace(probes=3), *base[1:]),
        (Trace("squared", probes=2), *base[1:]),
        (Quadratic(), *base[1:]),
        (base[0], prepared("mixer"), *base[2:]),
        (*base[:2], dataset(5), *base[3:]),
        (*base[:2], dataset(4).labelled([0, 1, 2, 3]), *base[3:]),
        (*base[:2], dataset(4).labelled([0, 1, 2, 2]), *base[3:]),
        (*base[:3], Choices((3, 4), (4,)), base[4]),
        (*base[:3], Choices((3, 8), (4,), Scheme(granularity="tensor")), base[4]),
        (*base[:3], replace(CHOICES, calibrate=Calibrate(weights="minmax")), base[4]),
        (*base[:3], replace(CHOICES, refine=(Optq(),)), base[4]),
        (*base[:3], replace(CHOICES, refine=(Optq(damping=0.2),)), base[4]),
        (*base[:3], replace(CHOICES, refine=(Optq(), Optq())), base[4]),
        (*base[:3], replace(CHOICES, refine=(Alike(),)), base[4]),
        (*base[:4], Run(seed=1)),
        (*base[:4], Run(batch=2)),
    ]
    for count, call in enumerate([base, *others], 1):
        predicted_losses(*call, tmp_path)  # type: ignore[arg-type]
        assert len(list(tmp_path.iterdir())) == count
    same = (*base[:3], Choices((3, 8), (4,), Scheme(weights=2)), base[4])  # its bits are not looked at
    predicted_losses(*same, tmp_path)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == len(others) + 1


class Two(nn.Module):
    """The same weights, another function."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.head, self.activation = nn.Conv2d(3, 2, 8), nn.Linear(2, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.conv(x)).flatten(1))


def test_networks_that_share_their_weights_are_told_apart(tmp_path: Path) -> None:
    for count, activation in enumerate((nn.ReLU(), nn.Tanh()), 1):
        made = prepare(capture(Two(activation).eval(), images(2)))
        predicted_losses(Quadratic(), made, dataset(2), Choices((4,), ()), Run(), tmp_path)
        assert len(list(tmp_path.iterdir())) == count


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    predicted_losses(Quadratic(), prepared("residual"), dataset(2), CHOICES, Run())
    assert not list(tmp_path.iterdir())


def test_tables_survive_json_to_the_last_bit() -> None:
    made = Table("x", {"a": {2: 0.1 + 0.2, 8: 1e-17}}, {"b": {16: -3.5}}, ["n"], {"error": {"a": 1 / 3}})
    assert Table.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("bits", [((1,), (8,)), ((4,), (9,)), ((16,), ())])
def test_bits_that_do_not_exist_are_refused(bits: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="Expected bits for"):
        Choices(*bits)
