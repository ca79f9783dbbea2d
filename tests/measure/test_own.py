"""A metric of the user's own: what it is called with, and what becomes of what it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import DataError, UsageError
from bitwright.given.images import load_images
from bitwright.measure.evaluation import compare
from bitwright.measure.tasks import Scoring
from bitwright.measure.truth_files import labelled


def accuracy(outputs: Tensor, truth: Tensor) -> Tensor:
    return (outputs.argmax(1) == truth).float().mean()


@pytest.fixture(scope="module")
def model() -> tuple[bw.QuantizedModel, Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(24, 3, 8, 8) + 2 * torch.randn(24, 3, 1, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        labels = net(images).argmax(1)
    return bw.quantize(net, images, "rtn", weights=2), images, labels


def test_a_metric_for_batches_gives_what_the_task_gives(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, labels = model
    ours = quantized.evaluate(images, labels, metric=accuracy)
    theirs = quantized.evaluate(images, labels)
    assert ours["quantized"]["accuracy"] == pytest.approx(theirs["quantized"]["top1"])
    assert ours["float"]["accuracy"] == 1
    assert set(ours["quantized"]) == {"accuracy", "accuracy_ci"}
    assert 0.5 < ours["quantized"]["accuracy"] < 1
    low, high = ours["evaluation"]["difference"]["accuracy_ci"]
    assert low < theirs["quantized"]["top1"] - 1 < high
    both = quantized.evaluate(images, labels, metric=lambda o, t: {"top1": accuracy(o, t)}, task="classification")
    assert both["quantized"]["own_top1"] == both["quantized"]["top1"]


def test_what_a_metric_or_decode_changes_is_a_copy(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, labels = model
    wanted = torch.nn.functional.one_hot(labels, 4)

    def in_place(outputs: Tensor, truth: Tensor) -> float:
        right = float((outputs.argmax(1) == truth.argmax(1)).float())
        outputs.zero_()
        truth.zero_()
        return right

    def plain(outputs: Tensor, truth: Tensor) -> float:
        return float((outputs.argmax(1) == truth.argmax(1)).float())

    expected = quantized.evaluate(images, wanted, metric=plain)
    for given in ({"metric": in_place}, {"metric": in_place, "decode": lambda o: o.mul_(2)}):
        found = quantized.evaluate(images, wanted.clone(), **given)
        assert found["quantized"]["in_place"] == expected["quantized"]["plain"] < 1
        assert found["fidelity"] == expected["fidelity"]


def test_truth_of_any_kind(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, _ = model
    with torch.no_grad():
        wanted = quantized(images) + 1
    seen: list[Any] = []

    def distance(outputs: Tensor, truth: Any) -> float:
        seen.append(truth)
        return float((outputs - torch.as_tensor(truth)).abs().max())

    found = quantized.evaluate(images, wanted, metric=distance)
    assert found["quantized"]["distance"] == pytest.approx(1, abs=1e-5)
    assert tuple(seen[0].shape) == (1, 4)
    from_loader = quantized.evaluate(zip(images.split(5), wanted.split(5), strict=True), metric=distance)
    assert from_loader["quantized"]["distance"] == pytest.approx(1, abs=1e-5)
    quantized.evaluate(images, [f"text {i}" for i in range(24)], metric=lambda _, t: seen.append(t) or 0.0)
    assert seen[-1] == ["text 23"]


def test_boxes_and_masks_are_in_the_input() -> None:
    images = load_images(torch.zeros(2, 3, 8, 8), None)
    seen: list[Any] = []
    own = Scoring(metric=lambda _, truth: seen.append(truth) or 0.0)
    compare(lambda x: [x], None, labelled(images, torch.ones(2, 8, 8, dtype=torch.int64)), scoring=own)
    assert tuple(seen[0].shape) == (1, 8, 8)
    boxes = [{"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([5])}] * 2
    compare(lambda x: [x], None, labelled(images, boxes), scoring=own)
    assert seen[-1][0]["boxes"].tolist() == [[1, 2, 3, 4]]
    assert seen[-1][0]["labels"].tolist() == [5]


class Gathers:
    """Like a metric of torchmetrics: the share of all answers that are right."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def update(self, outputs: Tensor, truth: Tensor) -> None:
        self.right += int((outputs.argmax(1) == truth).sum())
        self.count += len(truth)

    def compute(self) -> Tensor:
        return torch.tensor(self.right / self.count)


def test_an_object_is_updated_batch_by_batch_for_each_network(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, labels = model
    metric = Gathers()
    found = quantized.evaluate(images, labels, metric=metric, batch=7)
    assert found["quantized"]["gathers"] == pytest.approx(quantized.evaluate(images, labels)["quantized"]["top1"])
    assert found["float"]["gathers"] == 1
    assert "gathers_ci" not in found["quantized"]
    assert metric.count == 0


def test_numbers_that_are_none_do_not_count(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, _ = model
    metric = lambda _, t: {"seen": float("nan") if t[0] < 4 else 2.0}  # noqa: E731
    found = quantized.evaluate(images, list(range(24)), metric=metric)
    assert found["quantized"]["seen"] == 2
    assert found["evaluation"]["notes"] == ["seen is no number for 4 of 24 images, which do not count."]


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        (3, "Expected a function of outputs and truth as metric="),
        (Gathers, "found the class Gathers"),
        (lambda o, t: o, r"Expected a number from metric as lambda, found \(1, 4\)"),
        (lambda o, t: None, "Expected a number from metric as lambda, found NoneType"),
        (lambda o: 0, "Expected metric to return a number, it raised TypeError"),
        (lambda o, t: exit(3), "Expected metric to return a number, it raised SystemExit: 3"),
    ],
)
def test_bad_metrics(model: tuple[bw.QuantizedModel, Tensor, Tensor], metric: Any, line: str) -> None:
    quantized, images, labels = model
    with pytest.raises(UsageError, match=line):
        quantized.evaluate(images, labels, metric=metric)


def test_nothing_to_compare_with(model: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    quantized, images, labels = model
    with pytest.raises(DataError, match="Expected labels= beside metric=, found none"):
        quantized.evaluate(images, metric=accuracy)
    with pytest.raises(DataError, match="Expected labels of 24 images, found 3 of them"):
        quantized.evaluate(images, labels[:3].float()[:, None], metric=accuracy)
    with pytest.raises(UsageError, match="Expected one of 'classification', 'segmentation', 'detection' as task="):
        quantized.evaluate(images, labels, task="depth")
    with pytest.raises(DataError, match="Expected boxes as labels= for task='detection', found class indices"):
        quantized.evaluate(images, labels, task="detection")
