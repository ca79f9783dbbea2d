"""Folded networks compute what the unfolded ones do; what stays is listed with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, FOLDS, KEEPS, captured, images, make, model, outputs, prepared
from torch import Tensor, nn

from bitwright.graph import ops
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare


def norms(graph: torch.fx.GraphModule) -> list[str]:
    return [n.meta["layer"] for n in graph.graph.nodes if ops.base_name(n) == "batch_norm"]


@pytest.mark.parametrize("name", CASES)
def test_prepared_network_equals_the_model(name: str) -> None:
    x = images(5, seed=3)
    with torch.no_grad():
        found = prepared(name).graph(x)
    for a, b in zip(outputs(name, x), found, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_every_foldable_norm_is_folded(name: str) -> None:
    before, after = norms(captured(name).graph), norms(prepared(name).graph)
    assert len(before) == FOLDS.get(name, 0) + len(KEEPS.get(name, {}))
    assert sorted(after) == sorted(KEEPS.get(name, {}))
    reasons = {u.name: u.reason for u in prepared(name).unfolded}
    assert sorted(reasons) == sorted(after)
    for layer, word in KEEPS.get(name, {}).items():
        assert word in reasons[layer]


@pytest.mark.parametrize("name", ["residual", "transposed", "layer_scale", "norm_then_conv"])
def test_neither_the_model_nor_the_captured_graph_changes(name: str) -> None:
    network = make(name)
    made = capture(network, images(2))
    snapshots = [{k: v.clone() for k, v in m.state_dict().items()} for m in (network, made.graph)]
    prepare(made)
    for module, snapshot in zip((network, made.graph), snapshots, strict=True):
        state = module.state_dict()
        assert list(state) == list(snapshot)
        assert all(torch.equal(state[k], snapshot[k]) for k in state)


def test_folded_weights_are_the_closed_form() -> None:
    net, graph = model("residual"), prepared("residual").graph
    factor = net.bn1.weight / torch.sqrt(net.bn1.running_var + net.bn1.eps)
    torch.testing.assert_close(graph.stem.weight, (net.stem.weight * factor[:, None, None, None]).detach())
    expected = net.bn1.bias + (net.stem.bias - net.bn1.running_mean) * factor
    torch.testing.assert_close(graph.stem.bias, expected.detach())


def test_layer_scales_are_folded() -> None:
    left = {str(n.target) for n in prepared("layer_scale").graph.graph.nodes if n.op == "get_attr"}
    assert not left & {"gamma", "gain"}
    torch.testing.assert_close(
        prepared("layer_scale").graph.fc2.weight,
        (model("layer_scale").fc2.weight * model("layer_scale").gamma[:, None]).detach(),
    )


class _Branching(nn.Module):
    """The convolution's output is read beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (F.relu(self.bn(x)) + x).mean((2, 3))


class _TokenChannels(nn.Module):
    """A norm over tokens after a linear layer: its channels are not the layer's, though there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x.mean(2))).flatten(1)


class _Transposed(nn.Module):
    """A scale over tokens that a linear layer must not absorb, though there are as many as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 3), nn.Parameter(torch.tensor([[0.5], [1.5], [2.5]]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x.mean(2)) * self.scale).flatten(1)


class _Unaffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "left"),
    [(_Branching, {"bn": "used elsewhere"}), (_TokenChannels, {"bn": "channels"}), (_Transposed, {}), (_Unaffine, {})],
)
def test_neighbours_that_look_foldable(build: type[nn.Module], left: dict[str, str]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    made = prepare(capture(network, images(2)))
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(made.graph(x)[0], network(x), rtol=1e-5, atol=1e-5)
    assert norms(made.graph) == list(left)
    reasons = {u.name: u.reason for u in made.unfolded}
    assert reasons.keys() == left.keys()
    assert all(word in reasons[k] for k, word in left.items())


def test_a_product_that_is_read_twice_folds_the_second_time_no_more() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6) / 2)
            self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
            nn.init.uniform_(self.bn1.weight, 1.5, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3)).repeat(1, 2)
            return self.bn2(F.relu(self.bn1(x @ self.matrix)) @ self.matrix)

    torch.manual_seed(0)
    network = Twice().eval()
    made = prepare(capture(network, images(2)))
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(made.graph(x)[0], network(x), rtol=1e-5, atol=1e-5)
    assert len(made.unfolded) == 2
    assert len({n.meta["layer"] for n in made.graph.graph.nodes if ops.kind(n) == "linear"}) == 2
