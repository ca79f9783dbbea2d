"""Which axis of an output holds the classes: each network says in its own forward, the graph must find the same."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright as bw
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.readings import Reading, by_values

K = 6
Head = Callable[["Heads", Tensor, Tensor], object]


class Heads(nn.Module):
    """A feature map [B, 8, H, W] and layers that read it, arranged by a function of (module, map, images)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.map, self.anchors, self.two = nn.Conv2d(8, K, 1), nn.Conv2d(8, 2 * K, 1), nn.Conv2d(8, 8, 1)
        self.volume = nn.Conv3d(1, K, 3, padding=1)
        self.linear, self.other, self.one = nn.Linear(8, K), nn.Linear(8, K), nn.Linear(8, 1)
        self.boxes, self.norm = nn.Linear(8, 4), nn.LayerNorm(K)
        self.register_buffer("texts", torch.randn(K, 5))

    def forward(self, x: Tensor) -> object:
        return self.head(self, self.stem(x).relu(), x)


def pooled(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def readings(head: Head) -> dict[str, Reading]:
    torch.manual_seed(0)
    made = prepare(capture(Heads(head).eval(), cases.images(2)))
    return dict(zip(made.outputs, read_outputs(made.graph, cases.images(3), made.outputs), strict=True))


ALONG: dict[str, tuple[int, Head]] = {
    "[B, K]": (1, lambda m, y, _: m.linear(pooled(y))),
    "[B, K, H, W]": (1, lambda m, y, _: m.map(y)),
    "[B, H, W, K]": (3, lambda m, y, _: m.map(y).permute(0, 2, 3, 1)),
    "[B, H, W, K], linear": (3, lambda m, y, _: m.linear(y.permute(0, 2, 3, 1))),
    "[B, N, K]": (2, lambda m, y, _: m.linear(tokens(y))),
    "[B, K, N]": (1, lambda m, y, _: m.linear(tokens(y)).transpose(1, 2)),
    "tokens joined with images": (2, lambda m, y, _: m.linear(tokens(y).reshape(-1, 8)).reshape(y.shape[0], -1, K)),
    "[B, K, D, H, W]": (1, lambda m, _, x: m.volume(x.unsqueeze(1))),
    "two anchors a position": (2, lambda m, y, _: m.anchors(y).permute(0, 2, 3, 1).reshape(y.shape[0], -1, K)),
    "levels joined": (2, lambda m, y, _: torch.cat([tokens(m.map(y)), tokens(m.map(F.max_pool2d(y, 2)))], 1)),
    "made larger": (1, lambda m, y, _: F.interpolate(m.map(y), scale_factor=2, mode="bilinear")),
    "padded": (1, lambda m, y, _: F.pad(m.map(y), (1, 1, 1, 1))),
    "pooled by its largest": (1, lambda m, y, _: m.map(y).amax((2, 3))),
    "the first token": (1, lambda m, y, _: m.linear(tokens(y))[:, 0]),
    "two heads added": (1, lambda m, y, _: F.interpolate(m.map(F.max_pool2d(y, 2)), scale_factor=2.0) + m.map(y)),
    "two heads stacked": (2, lambda m, y, _: torch.stack([m.linear(pooled(y)), m.other(pooled(y))], 1)),
    "logarithms": (3, lambda m, y, _: m.map(y).permute(0, 2, 3, 1).log_softmax(-1)),
    "unit vectors against texts": (1, lambda m, y, _: F.normalize(m.linear(pooled(y)), dim=-1) @ m.texts),
    "a rectified map, pooled": (1, lambda m, y, _: pooled(m.map(y).relu())),
}


@pytest.mark.parametrize("name", ALONG)
def test_class_scores(name: str) -> None:
    axis, head = ALONG[name]
    assert readings(head) == {"output": Reading("scores", axis)}


@pytest.mark.parametrize(
    ("expected", "head"),
    [
        (Reading("probabilities", 1), lambda m, y, _: m.linear(pooled(y)).softmax(1)),
        (
            Reading("probabilities", 1),
            lambda m, y, _: (m.linear(pooled(y)).softmax(-1) + m.other(pooled(y)).softmax(-1)) / 2,
        ),
        (Reading("labels", 1), lambda m, y, _: m.linear(pooled(y)).sigmoid()),
        (Reading("labels", 1), lambda m, y, _: m.map(y).sigmoid() * m.two(y)[:, :1].sigmoid()),
        (Reading("labels"), lambda m, y, _: m.one(pooled(y)).sigmoid().squeeze(1)),
        (Reading("labels"), lambda m, y, _: m.map(y).softmax(1)[:, 1]),
        (Reading("whole"), lambda m, y, _: m.map(y).argmax(1)),
        (Reading("whole"), lambda m, y, _: m.linear(pooled(y)) > 0),
    ],
)
def test_other_answers(expected: Reading, head: Head) -> None:
    assert readings(head) == {"output": expected}


NONE: dict[str, tuple[str, str, Head]] = {
    "flattened": ("output", "same axis", lambda m, y, _: m.map(y).flatten(1)),
    "anchors apart": (
        "output",
        "along the axes 1, 4",
        lambda m, y, _: m.anchors(y).view(y.shape[0], 2, K, *y.shape[2:]).permute(0, 1, 3, 4, 2),
    ),
    "unit vectors": ("output", "embeddings", lambda m, y, _: F.normalize(m.linear(pooled(y)), dim=1)),
    "normalized": ("output", "normalization", lambda m, y, _: m.norm(m.linear(pooled(y)))),
    "features": ("output", "features", lambda m, y, x: pooled((m.stem(x) + y).relu())),
    "tanh": ("output", "tanh", lambda m, y, _: m.linear(pooled(y)).tanh()),
    "one number": ("output", "single channel", lambda m, y, _: m.one(pooled(y))),
    "pixels": ("output", "own pixels", lambda m, y, x: x - m.map(y)[:, :3]),
    "masks of queries": (
        "output",
        "not known",
        lambda m, y, _: torch.einsum("bqc,bchw->bqhw", m.linear(tokens(y))[:, :5], m.map(y)),
    ),
    "joined layers": ("output", "joined", lambda m, y, _: torch.cat([m.map(y), m.two(y)], 1)),
    "parts": ("output", "different ways", lambda m, y, _: torch.cat([m.map(y)[:, :2].sigmoid(), m.map(y)[:, 2:]], 1)),
    "by name": ("embedding", "By its name", lambda m, y, _: {"embedding": m.linear(pooled(y)), "b": y}),
    "by layer": ("output_1", "name of boxes", lambda m, y, _: (m.linear(pooled(y)), m.boxes(pooled(y)))),
    "four beside scores": (
        "output_1",
        "as boxes do",
        lambda m, y, _: (m.linear(tokens(y)), m.other(tokens(y))[..., :4].sigmoid()),
    ),
    "pyramid": (
        "output_1",
        "different sizes",
        lambda m, y, _: [m.map(F.max_pool2d(y, 2)), m.map(F.max_pool2d(y, 4))],
    ),
    "constant": ("output_1", "does not depend", lambda m, y, _: (m.linear(pooled(y)), m.texts * 2)),
    "empty": ("output_1", "empty", lambda m, y, _: (m.linear(pooled(y)), y[:, :0])),
}


@pytest.mark.parametrize("name", NONE)
def test_no_answers_and_the_reason(name: str) -> None:
    output, said, head = NONE[name]
    found = readings(head)[output]
    assert found.kind == ("constant" if name == "constant" else "values")
    assert said in found.note


def test_an_auxiliary_head_of_the_same_classes_keeps_its_answers() -> None:
    found = readings(lambda m, y, _: {"out": m.map(y), "aux": m.map(F.max_pool2d(y, 2))})
    assert found == {"out": Reading("scores", 1), "aux": Reading("scores", 1)}


def test_the_quantized_network_is_read_as_the_float_one() -> None:
    torch.manual_seed(0)
    net = Heads(lambda m, y, _: (m.map(y).permute(0, 2, 3, 1), m.linear(pooled(y)).softmax(1))).eval()
    model = bw.quantize(net, cases.images(8), "rtn", weights=8)
    assert model.teacher is not None
    expected = [Reading("scores", 3), Reading("probabilities", 1)]
    for graph in (model.teacher.graph, model.graph):
        assert read_outputs(graph, cases.images(2), model.outputs) == expected


def test_values_alone_tell_as_much_as_they_can() -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert by_values(scores) == Reading("scores", 1)
    assert by_values(scores.softmax(1)) == Reading("probabilities", 1)
    assert by_values(F.normalize(scores, dim=1)).kind == "values"
    assert by_values(scores[:, :0]).note == "It is empty."
    assert by_values(scores[:, :1].sigmoid()) == Reading("labels", 1)
