"""A task's figure without labels: the float network's own answers are the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bitwright as bw
from bitwright.bits.goal import Goal
from bitwright.errors import DataError, UsageError
from bitwright.given.images import Images, load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.given.models import load_model
from bitwright.given.preprocessing import Preprocessing
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student, insert_quantizers
from bitwright.measure.following import Follower
from bitwright.measure.tasks import Scoring
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run


def opened(name: str, source: str) -> tuple[Captured, Images, Any]:
    network = load_model(name)
    images = load_images(source, network.preprocessing).unlabelled()
    return prepare_teacher(network, images), images, network.decode


def rounded(teacher: Captured, images: Images, bits: int) -> Student:
    student = insert_quantizers(teacher, Scheme(weights=bits))
    return run_stages(recipe("rtn"), student, teacher, images, Run())


def likeness(outputs: Tensor, truth: Tensor) -> float:
    return float(1 / (1 + (outputs - truth).square().mean()))


@pytest.mark.parametrize(
    ("name", "task", "key"),
    [("zoo:fashion_segmenter", "segmentation", "miou"), ("zoo:fashion_detector", "detection", "map")],
)
def test_the_float_network_keeps_all_and_fewer_bits_keep_less(name: str, task: str, key: str) -> None:
    if task == "detection":
        pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    teacher, images, decode = opened(name, "zoo:scenes[:3]")
    follower = Follower.of(teacher, images, Scoring(task, beside=decode))
    assert (follower.key, follower.best) == (key, pytest.approx(1.0))
    coarse, fine = (follower.share(rounded(teacher, images, bits)) for bits in (3, 8))
    assert coarse[0] < fine[0] <= 1
    assert fine[1][0] <= fine[0] <= fine[1][1]


class Bright(nn.Module):
    """Two classes by how bright a pixel is."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 2, 1)
        self.score.weight.data = torch.tensor([[-0.3, -0.5, -0.2], [0.4, 0.3, 0.3]])[..., None, None]
        self.score.bias.data = torch.tensor([0.9, -0.9])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.score(x)
        return found


def bright(folder: Path) -> tuple[Captured, Images]:
    """Photos of which the network sees the middle alone, in another proportion."""
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 256, (24, 40, 3), np.uint8)).save(folder / f"{i}.png")
    how = Preprocessing(input_size=(3, 12, 8), crop_pct=0.5)
    images = load_images(folder, how)
    return prepare_teacher(as_model(Bright(), how), images), images


def test_answers_are_those_of_what_the_network_sees(tmp_path: Path) -> None:
    teacher, images = bright(tmp_path)
    follower = Follower.of(teacher, images, Scoring("segmentation"))
    assert follower.best == 1.0
    assert len(follower.images.truth.items) == 3  # type: ignore[union-attr]
    assert follower.images.truth.items[0].read().shape == (12, 8)  # type: ignore[union-attr]


class NotANumber:
    """It gathers, and computes nothing."""

    def update(self, outputs: Tensor, truth: Tensor) -> None:
        assert outputs.shape == truth.shape

    def compute(self) -> float:
        return math.nan


def test_a_metric_of_ones_own_is_given_outputs_or_answers_as_truth(tmp_path: Path) -> None:
    teacher, images = bright(tmp_path)
    follower = Follower.of(teacher, images, Scoring(metric=likeness))
    assert (follower.key, follower.best) == ("likeness", 1.0)
    coarse, fine = (follower.share(rounded(teacher, images, bits))[0] for bits in (2, 8))
    assert 0 < coarse < fine < 1

    def bright_ones(outputs: Tensor, truth: Tensor) -> Tensor:
        return (outputs.argmax(1) == truth).float().mean()

    assert Follower.of(teacher, images, Scoring("segmentation", bright_ones)).key == "bright_ones"
    with pytest.raises(DataError, match=r"must grow with likeness"):
        Follower.of(teacher, images, Scoring(metric=lambda a, b: (a - b).abs().mean()))
    for nothing in (lambda a, b: math.nan, lambda a, b: {"own": a.new_tensor(float("inf"))}, NotANumber()):
        with pytest.raises(DataError, match=r"found no number \(NaN\)"):
            Follower.of(teacher, images, Scoring(metric=nothing))
    with pytest.raises(DataError, match=r"truth of max_drop= is the float network's raw outputs\. If .* name task="):
        Follower.of(teacher, images, Scoring(metric=lambda a, b: (a == b["boxes"]).mean()))


class Two(nn.Module):
    """Two maps and a number that no image changes, under names or not."""

    def __init__(self, arrange: Callable[..., Any]) -> None:
        super().__init__()
        self.score, self.place, self.arrange = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3), arrange
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Any:
        return self.arrange(self.score(x), self.place(x), self.scale * 2)


ARRANGED: dict[str, Callable[..., Any]] = {
    "dict": lambda a, b, c: {"scores": a, "deep": [b, c]},
    "tuple": lambda a, b, c: (a, (b, c)),
}


@pytest.mark.parametrize("kind", ARRANGED)
def test_a_metric_of_several_outputs_is_given_truth_in_their_arrangement(kind: str) -> None:
    seen = []

    def metric(outputs: Any, truth: Any) -> float:
        (a, b, c), (d, e, f) = ([*_flat(each)] for each in (outputs, truth))
        assert type(outputs) is type(truth)
        seen.append([tuple(v.shape) for v in (a, b, c, d, e, f)])
        return float(1 / (1 + (a - d).square().mean() + (b - e).square().mean())) * float(c == f)

    torch.manual_seed(0)
    images = torch.randn(18, 3, 8, 8)  # more than one batch, of which the last has as many images as there are outputs
    goal = Goal.parse(max_drop=0.5, weights="8", metric=metric)
    plan = bw.quantize(Two(ARRANGED[kind]).eval(), images, "rtn", goal=goal).result["plan"]
    assert (plan["estimate"]["figure"], plan["estimate"]["agreement"] > 0.5) == ("metric", True)
    assert {tuple(s) for s in seen} == {((1, 2, 8, 8), (1, 4, 6, 6), (), (1, 2, 8, 8), (1, 4, 6, 6), ())}


def test_an_object_that_gathers_is_given_batches_in_that_arrangement() -> None:
    class Gathers:
        def __init__(self) -> None:
            self.count, self.error = 0, 0.0

        def update(self, outputs: Any, truth: Any) -> None:
            assert outputs["scores"].shape == truth["scores"].shape
            self.count += len(truth["scores"])
            self.error += float((outputs["scores"] - truth["scores"]).abs().mean())

        def compute(self) -> float:
            return self.count / (1 + self.error)

    torch.manual_seed(0)
    images = load_images(torch.randn(18, 3, 8, 8), None)
    teacher = prepare_teacher(as_model(Two(ARRANGED["dict"]).eval()), images)
    assert Follower.of(teacher, images, Scoring(metric=Gathers())).best == 18


def _flat(arranged: Any) -> list[Tensor]:
    a, (b, c) = arranged.values() if isinstance(arranged, dict) else arranged
    return [a, b, c]


def test_a_drop_of_a_figure_finds_the_smallest_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    images, found = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {}
    for drop in (0.9, 0.1):
        goal = Goal.parse(max_drop=drop, weights="2,8", task="segmentation")
        plan = bw.quantize(net.eval(), images, "rtn", goal=goal).result["plan"]
        found[drop] = plan["predicted"]["weight_bytes"], plan["estimate"]["agreement"]
        assert (plan["estimate"]["figure"], plan["goal"]["max_drop"]) == ("miou", drop)
        assert plan["estimate"]["agreement"] >= 1 - drop
        assert "measured" not in plan
    assert found[0.9] < found[0.1]


def test_a_task_without_a_drop_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Expected max_drop= beside task= or metric="):
        Goal.parse(target_size="9kB", task="segmentation")
