"""Rewrites keep the function and bring it into the operators that quantizers know."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, captured, images, outputs, prepared
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bitwright as bw
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare


def names(made: Captured) -> list[str]:
    return [ops.base_name(n) for n in made.graph.graph.nodes if n.op == "call_function"]


class _Attends(nn.Module):
    """Attention over the rows of an image, [N, 3, 8, 8] read as three heads of eight tokens."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        mask = settings.pop("mask", None)
        self.register_buffer("mask", mask)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.flip(-1), x * 0.5, self.mask, **self.settings)


def reference(x: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention token by token, with exponentials."""
    q, k, v = x, x.flip(-1), x * 0.5
    factor = 1 / math.sqrt(8) if scale is None else scale
    out = torch.zeros_like(x)
    for head in range(3):
        for i in range(8):
            scores = (q[:, head, i, None] * k[:, head]).sum(-1) * factor
            allowed = torch.ones(8, dtype=torch.bool)
            if causal:
                allowed[i + 1 :] = False
            if mask is not None and mask.dtype == torch.bool:
                allowed &= mask[i]
            elif mask is not None:
                scores = scores + mask[i]
            e = torch.exp(scores - scores.max()) * allowed
            out[:, head, i] = (e / e.sum(1, keepdim=True)).unsqueeze(-1).mul(v[:, head]).sum(1)
    return out


_generator = torch.Generator().manual_seed(0)
FLOAT_MASK = torch.randn(8, 8, generator=_generator) * 2
BOOL_MASK = (torch.rand(8, 8, generator=_generator) > 0.4) | torch.eye(8, dtype=torch.bool)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    ("mask", "causal"), [(None, False), (None, True), (FLOAT_MASK, False), (BOOL_MASK, False)], ids=str
)
def test_attention_is_decomposed(mask: Tensor | None, causal: bool, scale: float | None) -> None:
    network = _Attends(mask=mask, is_causal=causal, scale=scale)
    made = prepare(capture(network, images(2)))
    assert "scaled_dot_product_attention" not in names(made)
    assert names(made).count("matmul") == 2
    assert names(made).count("softmax") == 1
    for count in (1, 4):
        x = images(count, seed=5)
        torch.testing.assert_close(made.graph(x)[0], network(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(made.graph(x)[0], reference(x, mask, causal, scale), rtol=1e-5, atol=1e-6)


def test_two_attentions_in_one_module_have_names_of_their_own() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return F.scaled_dot_product_attention(y, x, y, is_causal=True)

    made, x = prepare(capture(Twice(), images(2))), images(3)
    layers = [n.meta["layer"] for n in made.graph.graph.nodes if n.op == "call_function"]
    assert len(set(layers)) == len(layers)
    torch.testing.assert_close(made.graph(x)[0], Twice()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_layer_names_stay_unique(name: str) -> None:
    layers = [
        n.meta["layer"] for n in prepared(name).graph.graph.nodes if n.op == "call_function" and ops.is_float_tensor(n)
    ]
    assert len(set(layers)) == len(layers)


@pytest.mark.parametrize("name", CASES)
def test_no_operator_is_left_that_has_no_image_in_it(name: str) -> None:
    """Constants are computed once; only what would enlarge a stored parameter is computed every time."""
    depends: set[torch.fx.Node] = set()
    for node in prepared(name).graph.graph.nodes:
        if node.op == "placeholder" or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
        elif node.op == "call_function":
            assert ops.base_name(node) == "index", node.format_node()
            assert name == "relative_position"


@pytest.mark.parametrize("name", CASES)
def test_nothing_random_identical_or_in_place_is_left(name: str) -> None:
    left = names(prepared(name))
    assert not [n for n in left if n.endswith("_") and not n.startswith("__")]
    assert not {"dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "view"} & set(left)


@pytest.mark.parametrize("name", CASES)
def test_every_linear_operator_has_a_bias(name: str) -> None:
    graph = prepared(name).graph
    found = [n for n in graph.graph.nodes if ops.kind(n) == "linear"]
    biases = [str(n.args[2].target) for n in found]
    assert all(graph.get_buffer(b).dim() == 1 for b in biases)
    assert len(set(biases)) == len(biases)


def test_standardised_weights_are_computed_once() -> None:
    convs = [n for n in prepared("functional").graph.graph.nodes if ops.kind(n) == "linear"]
    assert [str(n.args[1].target) for n in convs] == ["kernel", "raw"]
    assert "var_mean" not in names(prepared("functional"))
    assert "rsqrt" not in names(prepared("functional"))


def test_products_with_stored_matrices_are_linear_layers() -> None:
    graph = prepared("constant_matmul").graph.graph
    (linear,) = [n for n in graph.nodes if ops.kind(n) == "linear"]
    assert linear.meta["layer"] == "matrix"
    assert names(prepared("constant_matmul")).count("matmul") == 2  # stored on the left, and one matrix a channel


class _Expects(nn.Module):
    """The mean of a distribution over eight bins, as detectors make the sides of boxes: a layer of one row."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *, learned: bool) -> None:
        super().__init__()
        self.product = product
        self.bins = nn.Parameter(torch.arange(8.0)) if learned else torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.softmax(-1), self.bins)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    "product", [F.linear, torch.matmul, lambda x, row: torch.mv(x.flatten(0, 2), row).unflatten(0, x.shape[:3])]
)
def test_a_layer_of_one_row_is_a_matrix_of_one(product: Callable[[Tensor, Tensor], Tensor], learned: bool) -> None:
    network, x = _Expects(product, learned=learned), images(4)
    made = prepare(capture(network, images(2)))
    torch.testing.assert_close(made.graph(x)[0], (x.softmax(-1) * torch.arange(8.0)).sum(-1))
    (linear,) = (n for n in made.graph.graph.nodes if ops.base_name(n) == "linear")
    assert list(ops.shape(linear.args[1])) == [1, 8]
    quantized = bw.quantize(network, images(8), "mse", weights=8)
    assert quantized.evaluate(images(8))["fidelity"]["sqnr_db"] > 30


class _Writes(nn.Module):
    """A constant that is read between the writes to it, as a whole and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(64.0).view(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(8, 8)
        first = x * mask
        mask[:4] = 3.0
        second = x * mask
        mask.add_(1)
        copy = self.table.clone()
        row = copy[0]
        third = x * mask + row
        copy[0] = -1.0
        return torch.stack([first, second, third, x * copy + row, x * self.table], 1)


def test_constants_are_stored_as_their_readers_find_them() -> None:
    network, x = _Writes(), images(3)
    with torch.no_grad():
        expected = network(x)
    assert not torch.equal(expected[:, 0], expected[:, 1])
    captured_, table = capture(network, images(2)), network.table.detach().clone()
    assert torch.equal(captured_.graph(x)[0], expected)
    assert torch.equal(prepare(captured_).graph(x)[0], expected)
    assert torch.equal(network.table, table)
    assert torch.equal(captured_.graph.table, table)


def test_the_mask_of_shifted_windows_is_one_constant() -> None:
    constants = [n for n in captured("shifted_window").graph.graph.nodes if n.op == "get_attr"]
    (mask,) = [n for n in constants if str(n.target).startswith("constants.")]
    stored = captured("shifted_window").graph.get_buffer(str(mask.target))
    assert sorted(set(stored.flatten().tolist())) == [-100.0, 0.0]
    x = images(2)
    torch.testing.assert_close(captured("shifted_window").graph(x)[0], outputs("shifted_window", x)[0])


def test_a_function_beside_its_module_gets_a_bias_of_its_own() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(F.linear(x, self.fc.weight)))

    network, x = Beside(), images(3)
    made = prepare(capture(network, images(2)))
    with torch.no_grad():
        torch.testing.assert_close(made.graph(x)[0], network(x))
    layers = [n.meta["layer"] for n in made.graph.graph.nodes if ops.kind(n) == "linear"]
    assert len(set(layers)) == 2


class _Guarded(nn.Module):
    """A softmax that is 0 where a row has no scores."""

    def __init__(self, *masks: Tensor) -> None:
        super().__init__()
        for k, mask in enumerate(masks):
            self.register_buffer(f"mask_{k}", mask)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        for mask in self.buffers():
            scores = scores + mask.expand(len(x), 3, 8, 8)
        return scores.softmax(-1).nan_to_num(0.0)


CLOSED = torch.arange(8) < 4
"""Half of the keys, hidden."""


@pytest.mark.parametrize(
    ("masks", "guarded"),
    [((), False), ((FLOAT_MASK,), False), ((CLOSED,), False), ((CLOSED, ~CLOSED), True), ((CLOSED | ~CLOSED,), True)],
)
def test_softmax_is_guarded_where_a_row_can_be_without_scores(masks: tuple[Tensor, ...], guarded: bool) -> None:
    spelled = [m if m.is_floating_point() else torch.zeros(8).masked_fill(m, -math.inf) for m in masks]
    x = images(3)
    module = _Guarded(*spelled)
    made = prepare(capture(module, x))
    assert ("nan_to_num" in names(made)) == guarded
    torch.testing.assert_close(made.graph(x)[0], module(x))


class _Joins(nn.Module):
    """Tokens in front of others, of which there may be none, as rotary embeddings keep those of a class apart."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : self.kept], x[:, :, 8:], x[:, :, self.kept :] * 2], 2)


@pytest.mark.parametrize(("kept", "parts"), [(0, 0), (3, 2)])
def test_what_is_empty_is_not_joined(kept: int, parts: int) -> None:
    x = images(3)
    made = prepare(capture(_Joins(kept), x))
    joints = [n.args[0] for n in made.graph.graph.nodes if ops.base_name(n) == "cat"]
    assert list(map(len, joints)) == ([parts] if parts else [])
    torch.testing.assert_close(made.graph(x)[0], _Joins(kept)(x))


class _Scaled(nn.Module):
    """Products of factors that numbers scale before, [N, 3, 8, 8]."""

    def __init__(self, numbers: tuple[float, float], shared: bool = False) -> None:
        super().__init__()
        self.numbers, self.shared = numbers, shared

    def forward(self, x: Tensor) -> Tensor:
        query, key = x * self.numbers[0], x.transpose(-1, -2) / self.numbers[1]
        scores = query @ key
        return scores + query if self.shared else scores


def test_a_product_of_scaled_factors_is_scaled_behind() -> None:
    x = images(3)
    made = prepare(capture(_Scaled((0.5, 2.0)), x))
    assert names(made) == ["transpose", "matmul", "mul"]
    assert [n.args[1] for n in made.graph.graph.nodes if ops.base_name(n) == "mul"] == [0.25]
    torch.testing.assert_close(made.graph(x)[0], _Scaled((0.5, 2.0))(x))


@pytest.mark.parametrize("module", [_Scaled((0.5, 2.0), shared=True), _Scaled((1.0, 2.0))])
def test_factors_that_others_read_or_that_are_not_both_scaled_stay(module: _Scaled) -> None:
    x = images(3)
    made = prepare(capture(module, x))
    assert "div" in names(made)
    torch.testing.assert_close(made.graph(x)[0], module(x))


class _Turns(nn.Module):
    """Two blocks that compute the same angles, and one that computes others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.linspace(0, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        for shift in (0.0, 0.0, 1.0):
            x = (x * (self.angles + shift).cos()).relu() + (self.angles + shift).sin()
        return x


def test_what_several_blocks_compute_alike_is_stored_once() -> None:
    x = images(3)
    made = capture(_Turns(), x)
    assert len([n for n in made.graph.graph.nodes if n.op == "get_attr"]) == 4
    torch.testing.assert_close(made.graph(x)[0], _Turns()(x))


class _Alike(nn.Module):
    """Operators that differ in a number, in an order of memory or in the type of their operand alone."""

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = [x[:, :2] + 1, x[:, :3] + 1, x[:, :3] + 1.0, x.double()[:, :3] + 1]
        return [*rows, x.contiguous(memory_format=torch.channels_last)[:, :3] + 1, x.flatten(1), x.flatten(2)]


def _described(node: fx.Node) -> object:
    values = ops.value(node) if isinstance(ops.value(node), list | tuple) else [ops.value(node)]
    assert isinstance(values, list | tuple)
    return [(v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize("name", [*CASES, "operators that are nearly alike"])
def test_shapes_that_are_recorded_once_for_several_are_those_of_each(name: str) -> None:
    example = images(2)
    graph = prepared(name).graph if name in CASES else prepare(capture(_Alike(), example)).graph
    rewrite.propagate(graph, example)
    shared = {n.name: _described(n) for n in graph.graph.nodes}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():

        class Each(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                n.meta["val"] = super().run_node(n)
                return n.meta["val"]

        Each(graph).run(mode.from_tensor(example))
    assert shared == {n.name: _described(n) for n in graph.graph.nodes}
