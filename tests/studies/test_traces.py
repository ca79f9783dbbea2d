"""Hessian traces: the estimate meets the dense Hessian, and the label-free one where theory says so."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import dataset, prepared
from torch import Tensor, nn

from bitwright.curvature.label_free import label_free_scores
from bitwright.errors import ModelError
from bitwright.given.images import Images, load_images
from bitwright.graph.capture import Captured, capture
from bitwright.graph.points import linear_points
from bitwright.graph.prepare import prepare
from bitwright.studies import lfh
from bitwright.studies.traces import Loss, hessian_traces

N, CLASSES = 3, 4


class Net(nn.Module):
    """Three layers whose tails are easily written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 2, 4, stride=4), nn.Linear(8, 5), nn.Linear(5, CLASSES)

    def after_conv(self, z: Tensor) -> Tensor:
        return self.fc(torch.tanh(z).flatten(1))

    def after_fc(self, z: Tensor) -> Tensor:
        return self.head(F.silu(z))

    def forward(self, x: Tensor) -> Tensor:
        return self.after_fc(self.after_conv(self.conv(x)))


@cache
def network() -> tuple[Net, Captured, Images]:
    torch.manual_seed(3)
    net = Net().eval()
    images = load_images(torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2, None)
    return net, prepare(capture(net, images.batch(range(2)))), images


def losses() -> dict[str, Loss]:
    net, _, images = network()
    scores = net(images.batch(range(N))).detach()
    return {loss.name: loss for loss in lfh.losses(scores, torch.tensor([0, 3, 1]), seed=1)}


def dense(loss: Loss) -> list[float]:
    """Traces of the whole Hessian of each tensor, image by image."""
    net, _, images = network()
    conv = net.conv(images.batch(range(N))).detach()
    fc = net.after_conv(conv).detach()
    tails = {
        "conv": (conv, lambda z: net.after_fc(net.after_conv(z))),
        "fc": (fc, net.after_fc),
        "head": (net.after_fc(fc).detach(), lambda z: z),
    }
    found = []
    for values, tail in tails.values():
        total = 0.0
        for i in range(N):
            z = values[i : i + 1]
            flat = torch.autograd.functional.hessian(
                lambda v, z=z, tail=tail, i=i: loss.value(tail(v.reshape(z.shape)), loss.targets[i : i + 1]),
                z.flatten(),
            )
            total += float(flat.trace())
        found.append(total / N)
    return found


@pytest.mark.parametrize("name", [loss.name for loss in lfh.losses(torch.zeros(1, 2), torch.zeros(1), 0)])
def test_traces_meet_the_dense_hessian(name: str) -> None:
    _, teacher, images = network()
    loss = losses()[name]
    points = linear_points(teacher.graph, teacher.example)
    found = hessian_traces(teacher.graph, images, points, loss, probes=300)
    expected = dense(loss)
    assert [p.layer for p in points] == ["conv", "fc", "head"]
    assert max(map(abs, expected)) > 0.01
    for value, error, truth in zip(found.mean.tolist(), found.error.tolist(), expected, strict=True):
        assert abs(value - truth) < 4 * error + 1e-5 * abs(truth)
        assert error < 0.3 * max(map(abs, expected))


def test_traces_are_the_label_free_ones_where_the_network_fits() -> None:
    """Squared error to the network's own scores drops no term, so that both are ``2/k Tr(J^T J)``."""
    net, teacher, images = network()
    points = linear_points(teacher.graph, teacher.example)
    loss = Loss("fit", lfh._squared_error, net(images.batch(range(N))).detach(), 2 / CLASSES)
    true = hessian_traces(teacher.graph, images, points, loss, probes=400)
    free = label_free_scores(teacher.graph, images.batches(N), points, probes=400, least=400)
    errors = (true.error**2 + (free.error * free.layer_trace) ** 2).sqrt()
    assert bool(((true.mean - free.layer_trace).abs() < 4 * errors + 1e-4).all())


def test_distillation_stays_below_its_bound() -> None:
    _, teacher, images = network()
    points = linear_points(teacher.graph, teacher.example)
    loss = next(x for x in losses().values() if x.name.startswith("KL"))
    true = hessian_traces(teacher.graph, images, points, loss, probes=300)
    free = label_free_scores(teacher.graph, images.batches(N), points, probes=300, least=300)
    row = {"trace": true.mean.tolist(), "error": true.error.tolist(), "bound": loss.bound * CLASSES / 2}
    assert lfh.correlations(row, free.layer_trace.tolist())["below_bound"] == 1.0


def test_images_in_batches_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, images = network()
    points = linear_points(teacher.graph, teacher.example)
    loss = next(iter(losses().values()))
    monkeypatch.setattr("bitwright.studies.traces.BATCH", 2)
    found = hessian_traces(teacher.graph, images, points, loss, probes=300)
    assert found.mean[2] == pytest.approx(dense(loss)[2], abs=4 * float(found.error[2]) + 1e-5)


def test_a_network_without_class_scores_is_refused() -> None:
    teacher = prepared("upsample")
    points = linear_points(teacher.graph, teacher.example)
    loss = next(iter(lfh.losses(torch.zeros(2, 4), None, 0)))
    with pytest.raises(ModelError, match=r"one output of class scores .* found outputs of 1x"):
        hessian_traces(teacher.graph, dataset(2), points, loss)
