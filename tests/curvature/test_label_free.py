"""The label-free Hessian against dense Jacobians, image by image, within the error that theory gives the probes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, images, make
from torch import Tensor, fx, nn

from bitwright.curvature.label_free import HessianScores, cached_scores, images_at_once, label_free_scores
from bitwright.errors import ModelError
from bitwright.graph.capture import Captured, capture
from bitwright.graph.points import Point, linear_points
from bitwright.graph.prepare import prepare

SIZE = (2, 3, 3)


def noise(count: int, size: tuple[int, int, int] = SIZE, seed: int = 0) -> Tensor:
    """Images of very different contrast, so that no two have the same scores."""
    x = torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.3, 2.0, count).view(-1, 1, 1, 1)


class Net(nn.Module):
    """A convolution, an activation, a linear layer of ``k`` outputs, and what comes after it."""

    def __init__(self, end: Callable[[Tensor], object] = lambda y: y, k: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(k)
            self.conv, self.head, self.end = nn.Conv2d(2, 3, 2), nn.Linear(12, k), end

    def forward(self, x: Tensor) -> object:
        return self.end(self.head(F.gelu(self.conv(x)).flatten(1)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(nn.Flatten(), nn.Linear(18, 7), nn.Tanh(), nn.Linear(7, 5))


class Map(nn.Sequential):
    """A dense map of outputs."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            super().__init__(nn.Conv2d(2, 3, 2), nn.SiLU(), nn.Conv2d(3, 2, 1))


def teacher(network: nn.Module, size: tuple[int, int, int] = SIZE) -> Captured:
    return prepare(capture(network.eval(), noise(2, size, seed=9)))


@cache
def mlp() -> Captured:
    return teacher(Mlp())


@cache
def plain() -> Captured:
    return teacher(Net())


def scores(made: Captured, x: Tensor, *, size: int | None = None, **settings: object) -> HessianScores:
    """All probes are taken unless a tolerance is given; one batch unless a size is."""
    settings = {"tolerance": 0.0, **settings}
    return label_free_scores(made.graph, x.split(size or len(x)), linear_points(made.graph, made.example), **settings)


# -------------------------------------------------------------------------------------- the dense Jacobian


class _With(fx.Interpreter):
    """Runs a graph with another tensor in place of a node's value, or of what is stored at a path."""

    def __init__(self, graph: fx.GraphModule, name: str, tensor: Tensor) -> None:
        super().__init__(graph)
        self.name, self.tensor, self.original = name, tensor, torch.empty(0)

    def run_node(self, n: fx.Node) -> object:
        if self.name in {n.name, n.target}:
            self.original = super().run_node(n)
            return self.tensor if self.tensor.numel() else self.original
        return super().run_node(n)


def jacobian(graph: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """Of all outputs for one image with respect to a value, [k, *shape of the value]."""
    look = _With(graph, name, torch.empty(0))
    with torch.no_grad():
        look.run(x)

    def outputs(z: Tensor) -> Tensor:
        return torch.cat([o.flatten() for o in _With(graph, name, z).run(x) if o.is_floating_point()])

    return torch.autograd.functional.jacobian(outputs, look.original)


def exact(made: Captured, x: Tensor) -> tuple[Tensor, Tensor]:
    """Trace and attention by the definition, each image alone, [N, L]."""
    trace, attention = [], []
    points = linear_points(made.graph, made.example)
    for image in x.split(1):
        dense = [jacobian(made.graph, p.node, image) for p in points]
        trace.append([2 / len(j) * float(j.square().sum()) for j in dense])
        diagonals = [j.square().sum(0) for j in dense]
        attention.append([_by_channel(d, p) for d, p in zip(diagonals, points, strict=True)])
    return torch.tensor(trace), torch.tensor(attention)


def _by_channel(diagonal: Tensor, point: Point) -> float:
    others = [d for d in range(diagonal.dim()) if d != point.channels]
    return float((diagonal.mean(others) if others else diagonal).max())


def variance(made: Captured, x: Tensor, distribution: str) -> Tensor:
    """Of one probe's ``2/k ||J^T v||^2``, [N, L]: with M = J J^T, ``2 ||M||^2`` less ``2 sum M_ii^2`` for signs."""
    rows = []
    for image in x.split(1):
        row = []
        for point in linear_points(made.graph, made.example):
            j = jacobian(made.graph, point.node, image).flatten(1).double()
            m = j @ j.T
            one = 2 * float(m.square().sum() - (m.diagonal().square().sum() if distribution == "rademacher" else 0))
            row.append(one * (2 / len(j)) ** 2)
        rows.append(row)
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("network", [Mlp, Map], ids=["mlp", "map"])
def test_trace_of_every_image_within_four_standard_errors(network: type[nn.Module], distribution: str) -> None:
    made, x, probes = teacher(network()), noise(4), 200
    found = scores(made, x, probes=probes, distribution=distribution)
    expected, _ = exact(made, x)
    error = (variance(made, x, distribution) / probes).sqrt()
    assert found.outputs == (5 if network is Mlp else 8)
    assert found.probes == probes
    assert found.trace.shape == (4, 2)
    assert bool(((found.trace - expected).abs() <= 4 * error + 1e-5 * expected).all())
    torch.testing.assert_close(found.layer_trace, found.trace.mean(0))


def test_probes_have_the_variance_of_the_closed_form() -> None:
    """And those of signs the smaller one."""
    x = noise(1).expand(3000, -1, -1, -1)
    spread = {}
    for distribution in ("rademacher", "gaussian"):
        spread[distribution] = float(scores(mlp(), x, probes=2, least=2, distribution=distribution).trace[:, 0].var())
        expected = float(variance(mlp(), x[:1], distribution)[0, 0]) / 2
        assert spread[distribution] == pytest.approx(expected, rel=0.2)
    assert spread["rademacher"] < 0.85 * spread["gaussian"]


def test_cross_entropy_has_the_same_trace_for_two_labels_and_is_bounded() -> None:
    """Gauss-Newton: ``Tr(J^T A J)`` with ``A`` the Hessian at the logits; at most half of ``||J||^2`` (section 0.7)."""
    x, probes, k = noise(4), 400, 5
    found = scores(mlp(), x, probes=probes).trace
    error = (variance(mlp(), x, "rademacher") / probes).sqrt()
    for n, image in enumerate(x.split(1)):
        with torch.no_grad():
            logits = mlp().graph(image)[0]
        for i, point in enumerate(linear_points(mlp().graph, mlp().example)):
            j = jacobian(mlp().graph, point.node, image).flatten(1)
            traces = []
            for label in (0, 3):
                a = torch.autograd.functional.hessian(
                    lambda f, label=label: F.cross_entropy(f, torch.tensor([label])), logits
                ).reshape(k, k)
                traces.append(float((j.T @ a @ j).trace()))
            assert traces[0] == pytest.approx(traces[1], rel=1e-4)
            assert traces[0] <= k / 4 * float(found[n, i] + 4 * error[n, i])  # 2/k ||J||^2 times k/4


def test_weights_of_the_layers_do_not_depend_on_the_scale_of_the_outputs() -> None:
    x = noise(5)
    small, large = scores(plain(), x), scores(teacher(Net(lambda y: 7 * y)), x)
    torch.testing.assert_close(large.trace, 49 * small.trace, rtol=1e-4, atol=0)
    torch.testing.assert_close(large.log_weights(), small.log_weights(), rtol=1e-5, atol=1e-5)


def by_hand(*rows: list[float]) -> HessianScores:
    trace = torch.tensor(rows)
    return HessianScores([str(i) for i in range(trace.shape[1])], 3, trace, trace, torch.zeros(trace.shape[1]), 1)


def test_weights_of_the_layers_are_logarithms_above_the_least() -> None:
    weights = by_hand([1.0, 30.0, 7.0], [3.0, 170.0, 33.0]).log_weights()
    assert weights.tolist() == pytest.approx([0.0, math.log10(100 / 2), math.log10(20 / 2)], rel=1e-5)


def test_a_layer_without_a_trace_takes_the_second_smallest() -> None:
    assert by_hand([0.0, 100.0, 1.0, 10.0]).log_weights().tolist() == pytest.approx([0, 2, 0, 1])
    assert by_hand([0.0, 0.0]).log_weights().tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------- attention


def test_the_last_linear_layer_scores_one_exactly() -> None:
    found = scores(mlp(), noise(4), probes=3, least=3)
    assert found.attention[:, -1].tolist() == [1.0] * 4
    assert found.trace[:, -1].tolist() == [2.0] * 4
    assert found.error[-1] == 0
    gaussian = scores(mlp(), noise(4), probes=3, least=3, distribution="gaussian")
    assert 1.0 not in gaussian.attention[:, -1].tolist()


class _OneNumber(nn.Module):
    """A network whose outputs are summed up with weights: ``J`` is one row, and probes of one sign have no error."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found = self.network(x)
        parts = list(found.values()) if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
        flat = torch.cat([p.flatten(1) for p in parts], 1)
        return (flat * torch.linspace(0.5, 2.0, flat.shape[1])).sum(1, keepdim=True)


class TokensFirst(nn.Module):
    """[T, N, C] between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.flatten(2).permute(2, 0, 1)))).square().mean(0)


class Table(nn.Module):
    """A layer that reads an indexed table and no image."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("index", torch.arange(64) % 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).repeat(1, 1, 2)
        return self.head(F.gelu(tokens + self.fc(self.table[self.index])).mean(1))


def network_of(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make(name) if name in CASES else {"tokens_first": TokensFirst, "table": Table}[name]()


LAYOUTS = [
    "shifted_window",  # windows of an image side by side in axis 0
    "multi_head",  # tokens first, and tokens times images in one axis
    "tokens_first",
    "token_norm",  # images times tokens in one axis
    "transposed",
    "conv1d",
    "called_twice",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_of_a_batch_equal_those_of_every_image_alone(name: str) -> None:
    """With one output nothing is left to chance: every layout of images and channels must be read exactly."""
    made, x = prepare(capture(_OneNumber(network_of(name)).eval(), images(2))), images(3, seed=4)
    found, (trace, attention) = scores(made, x, probes=3, least=3), exact(made, x)
    assert found.outputs == 1
    torch.testing.assert_close(found.trace, trace, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.attention, attention, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("network", [Mlp, Map, Net], ids=["mlp", "map", "net"])
def test_attention_of_every_image_equals_the_diagonal_of_the_dense_jacobian(network: type[nn.Module]) -> None:
    """A mean of T squares of sums over signs has at most the relative error ``sqrt(2 / T)``."""
    made, x, probes = teacher(network()), noise(4) * torch.tensor([0.1, 1.0, 4.0, 20.0]).view(4, 1, 1, 1), 600
    found, (_, expected) = scores(made, x, probes=probes).attention, exact(made, x)
    assert bool(((found / expected - 1).abs() <= 4 * (2 / probes) ** 0.5).all())
    assert float(expected[:, 0].max() / expected[:, 0].min()) > 1.35  # images that are mixed up would show


def test_a_tensor_without_images_scores_the_mean_over_them() -> None:
    """Its gradient is a sum over the images, whose squares add up in expectation."""
    made, x, probes = prepare(capture(network_of("table").eval(), images(2))), images(4, seed=4), 600
    points = linear_points(made.graph, made.example)
    assert [p.constant for p in points] == [True, False]
    found, (trace, attention) = scores(made, x, probes=probes), exact(made, x)
    bound = 4.5 * (2 / probes) ** 0.5
    assert float(found.layer_trace[0]) == pytest.approx(float(trace[:, 0].mean()), rel=bound)
    alone = torch.stack([jacobian(made.graph, points[0].node, i).square().sum(0) for i in x.split(1)]).mean(0)
    assert found.attention[:, 0].tolist() == pytest.approx([_by_channel(alone, points[0])] * 4, rel=bound)
    assert float(attention[:, 0].mean()) > 0
    assert float(scores(made, x, probes=probes, size=2).layer_trace[0]) == pytest.approx(
        float(found.layer_trace[0]), rel=bound
    )


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("name", ["net", "called_twice"])
def test_scores_of_weights_equal_the_dense_jacobian_averaged_over_images(name: str) -> None:
    """The images share each weight; what their gradients have in common must not count."""
    if name == "net":
        made, x = plain(), torch.cat([noise(2)[1:].expand(2, -1, -1, -1), noise(2)])
    else:
        made, x = prepare(capture(make(name), images(2))), images(3, seed=5)
    probes = 500
    found = scores(made, x, probes=probes, elements=True).elements
    stored = {str(n.target) for n in made.graph.graph.nodes if n.op == "get_attr" and str(n.target).endswith("weight")}
    assert set(found) == {s for s in stored if "bn" not in s}
    for target, diagonal in found.items():
        expected = torch.stack([jacobian(made.graph, target, i).square().sum(0) for i in x.split(1)]).mean(0)
        alive = expected > 1e-6 * expected.max()
        ratios = diagonal[alive] / expected[alive]
        assert diagonal.shape == expected.shape
        assert float((ratios - 1).abs().max()) < 5 * (2 / probes) ** 0.5
        assert float((ratios - 1).square().mean()) < 1.3 * 2 / probes
        assert not bool(diagonal[expected == 0].any())


def test_weights_are_left_as_they_were() -> None:
    stored = dict(plain().graph.named_buffers())
    before, code = {k: v.clone() for k, v in stored.items()}, str(plain().graph.graph)
    with torch.no_grad():
        scores(plain(), noise(3), elements=True, probes=8, least=2, tolerance=1e9)  # ends before its last probe
        assert not torch.is_grad_enabled()
    assert not scores(plain(), noise(3), probes=2, least=2).elements
    for name, tensor in stored.items():
        assert not tensor.requires_grad
        assert tensor.grad is None
        assert torch.equal(tensor, before[name])
    assert str(plain().graph.graph) == code


# ----------------------------------------------------------------------------------------- when to be done


def test_the_reported_error_is_that_of_the_means() -> None:
    """Over many seeds, deviations divided by the error have the mean square of Student's t: (T - 1) / (T - 3)."""
    x, probes = noise(10), 15
    truth = exact(mlp(), x)[0].mean(0)
    squares = []
    for seed in range(40):
        found = scores(mlp(), x, size=5, probes=probes, seed=seed)
        squares.append(float((found.layer_trace[0] / truth[0] - 1) / found.error[0]) ** 2)
    assert 0.6 < sum(squares) / len(squares) / (14 / 12) < 1.6


def test_probes_end_at_the_tolerance_but_not_before_the_least() -> None:
    x = noise(8)
    assert scores(mlp(), x, tolerance=1e9, least=5, probes=50).probes == 5
    assert scores(mlp(), x, tolerance=0.0, least=5, probes=50).probes == 50
    assert scores(mlp(), x, tolerance=1e9, least=1, probes=50).probes == 2  # one probe says nothing of its error
    for tolerance in (0.04, 0.02):
        found = scores(mlp(), x, tolerance=tolerance, probes=3000)
        assert 4 < found.probes < 3000
        assert float(found.error.max()) <= tolerance
        again = scores(mlp(), x, probes=found.probes - 1)
        assert float(again.error.max()) > tolerance  # one less would not have done


def test_batches_share_the_error_that_is_allowed() -> None:
    """Of 6 batches each may have ``sqrt(6)`` times the error, where their number is known."""
    x = noise(24)
    found = scores(mlp(), x, size=4, tolerance=0.015, probes=2000, total=24)
    alone = scores(mlp(), x, size=4, tolerance=0.015, probes=2000)
    assert 8 < found.probes < alone.probes / 3
    assert float(found.error.max()) <= 1.2 * 0.015
    assert float(alone.error.max()) <= 0.015 / 2


def test_one_probe_has_no_error_to_report() -> None:
    found = scores(mlp(), noise(3), probes=1, least=1)
    assert found.probes == 1
    assert found.error.tolist() == [math.inf, math.inf]


def test_the_gradients_of_one_probe_are_gone_before_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, given, left = torch.autograd.grad, list[weakref.ref[Tensor]](), list[int]()

    def spy(*args: object, **settings: object) -> tuple[Tensor, ...]:
        left.append(sum(each() is not None for each in given))
        found = grad(*args, **settings)
        given[:] = map(weakref.ref, found)
        return found

    monkeypatch.setattr(torch.autograd, "grad", spy)
    made = teacher(Net())
    batches = [noise(3, seed=0), noise(3, seed=1)]
    label_free_scores(made.graph, batches, linear_points(made.graph, made.example), probes=3, least=3, elements=True)
    assert left == [0] * 6


def test_a_batch_of_scores_fits_the_memory_given() -> None:
    """Of each image: the 7 and 5 values of the two layers, and the 7 of tanh that its derivative needs, in 4 bytes."""
    captured = mlp()
    points, pair, each = linear_points(captured.graph, captured.example), noise(2), 4 * (7 + 5 + 7)
    for budget, expected in ((0, 1), (each, 1), (3 * each, 3), (3 * each - 1, 2)):
        assert images_at_once(captured.graph, pair, points, budget) == expected


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("name", ["tuple_output", "dict_output"])
def test_several_outputs_count_as_one_long_one(name: str) -> None:
    made, x, probes = prepare(capture(make(name), images(2))), images(3, seed=6), 300
    found, (expected, _) = scores(made, x, probes=probes), exact(made, x)
    assert found.outputs == 3 + 2 * 3 * 3
    error = (variance(made, x, "rademacher") / probes).sqrt()
    assert bool(((found.trace - expected).abs() <= 4 * error + 1e-5 * expected).all())


ENDS: dict[str, Callable[[Tensor], object]] = {
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: F.log_softmax(y, 1),
    "reshaped_softmax": lambda y: y.softmax(1).reshape(-1, 2, 2),
    "argmax": lambda y: y.argmax(1),
    "index_of_max": lambda y: y.max(1)[1],
    "above": lambda y: (y > 0).float(),
    "count": lambda y: (y > 0).sum(1),
    "logits_and_probabilities": lambda y: (y, y.softmax(1)),
    "and_zeros": lambda y: (y, torch.zeros(y.shape[0], 2)),
    "and_a_number_of_pixels": lambda y: (y, torch.full((y.shape[0],), 9)),
}


@pytest.mark.parametrize("name", ENDS)
def test_outputs_without_a_useful_derivative_give_way_to_the_logits(name: str) -> None:
    x = noise(3)
    found, expected = scores(teacher(Net(ENDS[name])), x, probes=6), scores(plain(), x, probes=6)
    assert found.outputs == 4
    torch.testing.assert_close(found.trace, expected.trace)
    torch.testing.assert_close(found.attention, expected.attention)


@pytest.mark.parametrize(
    "end", [lambda y: y.amax(1), torch.sigmoid, lambda y: y.topk(2)[0]], ids=["amax", "sigmoid", "values of topk"]
)
def test_outputs_with_a_derivative_stay(end: Callable[[Tensor], object]) -> None:
    made, x, probes = teacher(Net(end)), noise(3), 300
    found, (expected, _) = scores(made, x, probes=probes), exact(made, x)
    error = (variance(made, x, "rademacher") / probes).sqrt()
    assert bool(((found.trace - expected).abs() <= 4 * error + 1e-5 * expected).all())


class _Cut(nn.Module):
    """A derivative of zero behind the first layer, or behind the last."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.conv, self.head, self.last = nn.Conv2d(2, 3, 2), nn.Linear(12, 4), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1)
        return self.head(x).round() * 2 if self.last else self.head(x.round())


def test_layers_that_the_output_does_not_feel_score_zero() -> None:
    found = scores(teacher(_Cut(last=False)), noise(3), probes=6)
    assert found.trace.tolist() == [[0.0, 2.0]] * 3
    assert found.attention.tolist() == [[0.0, 1.0]] * 3
    assert found.error.tolist() == [0.0, 0.0]
    assert found.log_weights().tolist() == [1.0, 1.0]  # zero takes the value of the other, and equals count equally


def test_an_output_that_feels_nothing_ends_the_probing_with_zeros() -> None:
    found = scores(teacher(_Cut(last=True)), noise(3), probes=20)
    assert found.probes == 4
    assert not bool(found.trace.any())
    assert found.log_weights().tolist() == [1.0, 1.0]


class _Root(nn.Module):
    """The derivative of the square root is infinite at zero, where that of the square is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((0 * self.conv(x)).square().sqrt().flatten(1))


def test_a_gradient_that_is_not_finite_is_blamed_on_its_layer() -> None:
    with pytest.raises(ModelError, match=r"gradient at conv is not finite .* leave out images"):
        scores(teacher(_Root()), noise(3))


# ---------------------------------------------------------------------------------------- seeds and cache


def test_the_same_seed_gives_the_same_bits() -> None:
    runs = [scores(plain(), noise(5), size=2, probes=5, elements=True, seed=s) for s in (1, 1, 2)]
    for what in ("trace", "attention", "error"):
        first, same, other = (getattr(r, what) for r in runs)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
    assert all(torch.equal(t, runs[1].elements[n]) for n, t in runs[0].elements.items())


def test_each_batch_has_probes_of_its_own() -> None:
    twice = noise(1).expand(2, -1, -1, -1)
    a, b = scores(mlp(), twice, size=1, probes=2, least=2).trace[:, 0].tolist()
    assert a != b


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    made = scores(plain(), noise(3), probes=5, elements=True)
    calls: list[str] = []

    def compute() -> HessianScores:
        calls.append("")
        return made

    folder = tmp_path / "state"
    assert cached_scores(None, "key", compute) is made
    assert not folder.exists()
    assert cached_scores(folder, "key", compute) is made
    found = cached_scores(folder, "key", compute)
    assert len(calls) == 2
    assert (found.layers, found.outputs, found.probes) == (made.layers, made.outputs, made.probes)
    for what in ("trace", "attention", "error"):
        assert torch.equal(getattr(found, what), getattr(made, what))
    assert list(found.elements) == list(made.elements)
    assert all(torch.equal(t, made.elements[n]) for n, t in found.elements.items())
    cached_scores(folder, "another key", compute)
    assert len(calls) == 3
