"""Products, traces and spectra against dense Hessians and Gauss-Newton matrices of tiny networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, dataset, images, make, prepared
from dense import bend, function, matrix_of, part, second, spans
from torch import Tensor, nn

from bitwright.curvature.hessian import Curvature, Data, Matrix, spectra, traces, weight_groups, weights_of
from bitwright.curvature.label_free import label_free_scores
from bitwright.errors import DataError, ModelError, UsageError
from bitwright.given.images import Images, load_images
from bitwright.graph.capture import Captured, capture
from bitwright.graph.points import linear_points
from bitwright.graph.prepare import prepare

N, CLASSES = 5, 4
LABELS = [0, 3, 1, 1, 2]


class Net(nn.Module):
    """A convolution and two linear layers, smooth, so that every term of the Hessian is there."""

    def __init__(self, end: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.conv, self.fc, self.head, self.end = nn.Conv2d(3, 2, 4, stride=4), nn.Linear(8, 3), nn.Linear(3, 4), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(F.silu(self.fc(torch.tanh(self.conv(x)).flatten(1)))))


@cache
def plain(kind: str = "logits") -> Captured:
    ends = {"logits": lambda y: y, "softmax": lambda y: y.softmax(1), "map": lambda y: y.view(-1, 2, 2, 1) * 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return prepare(capture(Net(ends[kind]).eval(), images(2)))


def some(labelled: bool = True) -> Images:
    data = load_images(images(N, 2) * 1.5, None)
    return data.labelled(LABELS) if labelled else data


def curvature(made: Captured, matrix: Matrix = "fisher", batch: int = N, data: Images | None = None) -> Curvature:
    return Curvature(made.graph, Data(data or some(), batch), matrix)


@cache
def truth(matrix: Matrix, kind: str = "logits") -> Tensor:
    found = matrix_of(plain(kind), matrix, some().batch(range(N)), LABELS)
    torch.testing.assert_close(found, found.T, rtol=1e-3, atol=1e-5)
    return found


ALL: list[Matrix] = ["fisher", "squared", "hessian"]

# ------------------------------------------------------------------------------------------------- groups


def test_groups_are_layers_blocks_and_the_network() -> None:
    made = weight_groups(prepared("residual").graph)
    assert [(g.kind, g.name) for g in made] == [
        ("layer", "stem"), ("layer", "conv"), ("layer", "head"),
        ("block", "stem"), ("block", "conv"), ("block", "head"), ("network", "network"),
    ]  # fmt: skip
    sizes = {"stem": 4 * 3 * 9, "conv": 4 * 4 * 9, "head": 4 * 4}
    assert [g.parameters for g in made] == [*sizes.values(), *sizes.values(), sum(sizes.values())]


@pytest.mark.parametrize("name", ["tied_weights", "called_twice"])
def test_a_shared_weight_is_one_layer(name: str) -> None:
    made = weight_groups(prepared(name).graph)
    layers = [g for g in made if g.kind == "layer"]
    assert len({g.weights for g in layers}) == len(layers)
    assert len([n for n in prepared(name).graph.graph.nodes if "conv2d" in n.name]) == len(layers) + 1
    assert made[-1].parameters == sum(g.parameters for g in layers)


# ----------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("matrix", ALL)
def test_products_with_every_group_equal_the_dense_matrix(matrix: Matrix) -> None:
    made = plain()
    wanted = weight_groups(made.graph)
    vectors = [torch.randn(g.parameters, generator=torch.Generator().manual_seed(7)) for g in wanted]
    found = curvature(made, matrix).products([g.weights for g in wanted], vectors)
    for group, vector, product in zip(wanted, vectors, found, strict=True):
        expected = part(truth(matrix), made, group) @ vector
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "map"])
def test_outputs_behind_a_softmax_and_maps_of_scores(kind: str) -> None:
    """A softmax gives way to its logits; on a map the loss is the mean over positions."""
    made, reference = plain(kind), "logits" if kind == "softmax" else "map"
    network = weight_groups(made.graph)[-1]
    vector = torch.randn(network.parameters, generator=torch.Generator().manual_seed(8))
    (found,) = curvature(made).products([network.weights], [vector])
    torch.testing.assert_close(found, truth("fisher", reference) @ vector, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("matrix", ALL)
def test_one_batch_or_five_give_the_same_products(matrix: Matrix) -> None:
    network = weight_groups(plain().graph)[-1]
    vector = torch.randn(network.parameters, generator=torch.Generator().manual_seed(9))
    one, five, uneven = (curvature(plain(), matrix, b).products([network.weights], [vector])[0] for b in (5, 1, 2))
    torch.testing.assert_close(one, five, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one, uneven, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
@pytest.mark.parametrize("name", ["squeeze_excite", "transformer", "layer_scale", "shifted_window", "conv1d"])
def test_products_of_real_operators_equal_finite_differences(name: str, matrix: Matrix) -> None:
    """``H v`` from differences of gradients, in float64; ``J v`` from differences of outputs for Gauss-Newton."""
    made = prepare(capture(make(name), images(2)))
    made.graph.double()
    x = images(3, 4).double()
    labels = torch.tensor([0, 1, 2])
    outputs, flat = function(made, list(weights_of(made.graph)))
    v = torch.randn(len(flat), generator=torch.Generator().manual_seed(1)).double()
    step = 1e-5

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(outputs(w, x).flatten(1), labels), w)[0]

    if matrix == "hessian":
        if outputs(flat, x).dim() != 2:
            pytest.skip("no class scores")
        expected = (gradient(flat + step * v) - gradient(flat - step * v)) / (2 * step)
    else:
        push = ((outputs(flat + step * v, x) - outputs(flat - step * v, x)) / (2 * step)).detach()
        w = flat.detach().requires_grad_(True)
        y = outputs(w, x)
        bent = torch.stack(
            [
                (bend("fisher", a[:, None] if a.dim() == 1 else a) @ p.flatten()).view_as(a)
                for a, p in zip(y.detach().float(), push.float(), strict=True)
            ]
        )
        expected = torch.autograd.grad(y, w, bent.double())[0] / len(x)

    class Doubles(Data):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield x, labels

    data = Doubles(load_images(x.float(), None).labelled(labels.tolist()))
    network = weight_groups(made.graph)[-1]
    (found,) = Curvature(made.graph, data, matrix).products([network.weights], [v])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_network_is_left_as_it_was() -> None:
    made = plain()
    before = {n: t.clone() for n, t in made.graph.named_buffers()}
    code = made.graph.code
    traces(curvature(made, "hessian"), weight_groups(made.graph), probes=2)
    for name, tensor in made.graph.named_buffers():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad
    assert made.graph.code == code


# ------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("batch", [5, 1])
@pytest.mark.parametrize("matrix", ALL)
def test_traces_of_every_group_lie_within_their_errors(matrix: Matrix, batch: int) -> None:
    wanted = weight_groups(plain().graph)
    found = traces(curvature(plain(), matrix, batch), wanted, probes=150, tolerance=0)
    expected = torch.tensor([float(part(truth(matrix), plain(), g).trace()) for g in wanted]).double()
    assert found.probes == 150
    assert bool(((found.trace - expected).abs() <= 4 * found.error + 1e-5 * expected.abs()).all())
    if matrix == "hessian" and batch == N:  # signs: twice the squares off the diagonal (section 0.7)
        off = truth(matrix).double() - torch.diag(truth(matrix).diagonal()).double()
        assert float(found.error[-1]) == pytest.approx((2 * float(off.square().sum()) / 150) ** 0.5, rel=0.25)
    for group, trace in zip(wanted, found.trace, strict=True):
        summed = sum(float(found.channels[p].sum()) for p in group.weights)
        assert summed == pytest.approx(float(trace), rel=1e-5)


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
def test_traces_of_channels_are_those_of_the_dense_diagonal(matrix: Matrix) -> None:
    """Within four standard errors of signs; those of ``fisher``, which is a sum of squares, are at most as large."""
    probes = 400
    found = traces(curvature(plain(), matrix), weight_groups(plain().graph), probes=probes, tolerance=0)
    whole = truth(matrix).double()
    for path, rows in spans(plain()).items():
        shape = plain().graph.get_buffer(path).shape
        for channel, members in enumerate(torch.tensor(list(rows)).view(shape[0], -1)):
            inside = whole[members][:, members]
            expected = float(inside.trace())
            within = float(inside.square().sum() - inside.diagonal().square().sum())
            across = float(whole[members].square().sum()) - float(inside.square().sum())
            error = ((2 * within + across) / probes) ** 0.5 if matrix == "hessian" else (2 / probes) ** 0.5 * expected
            assert abs(float(found.channels[path][channel]) - expected) < 4 * error + 1e-6


def test_channels_of_a_transposed_convolution_are_its_outputs() -> None:
    made = prepared("transposed")
    look = curvature(made, data=dataset(2))
    shape = look.weights["grouped.weight"].shape  # [I, O / groups, kh, kw], two groups
    assert tuple(shape) == (4, 3, 3, 3)
    marked = torch.zeros(shape)
    marked[2:, 1] = 1  # second group, its second output: channel 3 + 1
    assert look.channels("grouped.weight", marked).tolist() == [0, 0, 0, 0, 18, 0]


def test_the_reported_error_is_that_of_the_traces() -> None:
    """Over many seeds, deviations divided by the error have the mean square of Student's t: (T - 1) / (T - 3)."""
    wanted, probes = weight_groups(plain().graph), 25
    for matrix in ("fisher", "hessian"):
        expected = float(truth(matrix).trace())
        squares = []
        for seed in range(40):
            found = traces(curvature(plain(), matrix), wanted[-1:], probes=probes, tolerance=0, seed=seed)
            squares.append(float((found.trace[0] - expected) / found.error[0]) ** 2)
        assert 0.6 < sum(squares) / len(squares) / (24 / 22) < 1.6


def test_probing_ends_at_the_tolerance_but_not_before_the_least() -> None:
    wanted = weight_groups(plain().graph)
    assert traces(curvature(plain()), wanted, tolerance=1e9, least=5).probes == 5
    assert traces(curvature(plain()), wanted, tolerance=1e9, least=1).probes == 2
    found = traces(curvature(plain()), wanted, tolerance=0.1, probes=2000)
    assert 5 < found.probes < 2000
    assert float((found.error / found.trace).max()) <= 0.1
    again = traces(curvature(plain()), wanted, tolerance=0, probes=found.probes - 1)
    assert float((again.error / again.trace).max()) > 0.1
    assert math.isinf(float(traces(curvature(plain()), wanted, probes=1).error[0]))


def test_the_same_seed_gives_the_same_numbers() -> None:
    wanted = weight_groups(plain().graph)
    one, same, other = (traces(curvature(plain()), wanted, probes=5, seed=s).trace for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------- with and without labels


def test_cross_entropy_bends_the_outputs_the_same_for_every_label() -> None:
    """Section 0.7: the Gauss-Newton part of cross-entropy does not depend on labels; what is left out does."""
    x = some().batch(range(N))
    outputs, flat = function(plain(), list(weights_of(plain().graph)))
    fisher, halves = truth("fisher"), []
    for label in (0, 3):
        total = torch.zeros_like(fisher)
        for image in x.split(1):
            y = outputs(flat, image)[0].detach()
            j = torch.func.jacrev(outputs)(flat, image)[0]
            target = torch.tensor(label)
            total += j.T @ second(lambda f, t=target: F.cross_entropy(f, t))(y) @ j
        halves.append(total / N)
    torch.testing.assert_close(halves[0], fisher, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(halves[1], fisher, rtol=1e-3, atol=1e-5)
    assert float((truth("hessian") - fisher).abs().max()) > 0.1 * float(fisher.abs().max())


def test_label_free_traces_do_not_change_with_labels() -> None:
    wanted = weight_groups(plain().graph)
    data = load_images(images(N, 2) * 1.5, None)
    found = [
        traces(curvature(plain(), data=d), wanted, probes=6).trace
        for d in (data, data.labelled([0] * N), data.labelled([3] * N))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["conv_bn_relu6", "residual", "transformer", "mixer", "dense"])
def test_the_trace_without_labels_is_at_most_half_that_of_the_jacobian(name: str) -> None:
    """``Tr(J^T A J) <= 1/2 Tr(J^T J)`` (section 0.7); ``squared`` is ``2/k J^T J`` with k = 4 outputs."""
    made = prepared(name)
    wanted = weight_groups(made.graph)
    fisher, squared = (
        traces(curvature(made, m, data=dataset(4)), wanted, probes=20, tolerance=0) for m in ("fisher", "squared")
    )
    slack = 4 * (fisher.error + squared.error)
    assert bool((fisher.trace <= 0.5 * (CLASSES / 2) * squared.trace + slack).all())
    assert bool((fisher.trace > 0).all())


def test_at_the_last_layer_the_hessian_is_the_fisher_matrix_whatever_the_labels() -> None:
    """Outputs are linear in the last layer's weights, so that the term with their second derivative is zero."""
    head = weight_groups(plain().graph)[2]
    vectors = list(torch.eye(head.parameters))
    free, labelled, others = (
        torch.stack(curvature(plain(), m, data=some().labelled(y)).products([head.weights] * len(vectors), vectors))
        for m, y in (("fisher", LABELS), ("hessian", LABELS), ("hessian", [2] * N))
    )
    torch.testing.assert_close(labelled, free, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(others, free, rtol=1e-4, atol=1e-6)
    assert float(free.diagonal().min()) > 0


def test_the_squared_trace_of_weights_is_that_of_the_label_free_scores() -> None:
    """Two estimates of ``2/k sum diag(J^T J)``, computed by different code."""
    made, x = plain(), some().batch(range(N))
    scores = label_free_scores(
        made.graph, [x], linear_points(made.graph, made.example), probes=400, tolerance=0, elements=True
    )
    wanted = [g for g in weight_groups(made.graph) if g.kind == "layer"]
    found = traces(curvature(made, "squared"), wanted, probes=400, tolerance=0)
    for group, trace, error in zip(wanted, found.trace, found.error, strict=True):
        expected = 2 / CLASSES * float(scores.elements[group.weights[0]].sum())
        assert float(trace) == pytest.approx(expected, abs=6 * float(error))


# ------------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("batch", [5, 1])
@pytest.mark.parametrize("matrix", ALL)
def test_top_eigenvalues_of_every_group_equal_the_dense_ones(matrix: Matrix, batch: int) -> None:
    """Each once: with ``squared``, every output has the same eigenvalues at the last layer."""
    wanted = weight_groups(plain().graph)
    found = spectra(curvature(plain(), matrix, batch), wanted, count=3, steps=40, tolerance=1e-4)
    for group, spectrum in zip(wanted, found, strict=True):
        true = torch.linalg.eigvalsh(part(truth(matrix), plain(), group).double())
        scale = float(true.abs().max())
        kept: list[float] = []
        for value in true[true.abs().argsort(descending=True)].tolist():
            if all(abs(value - other) > 1e-5 * scale for other in kept):
                kept.append(value)
        expected = torch.tensor(kept[:3])
        torch.testing.assert_close(torch.tensor(spectrum.eigenvalues), expected, rtol=1e-3, atol=2e-4 * scale)
        assert max(spectrum.errors) <= 1e-3 * scale


def test_the_density_has_the_moments_of_the_dense_spectrum() -> None:
    network = weight_groups(plain().graph)[-1:]
    (found,) = spectra(curvature(plain(), "hessian"), network, steps=12, tolerance=0, runs=60)
    true = torch.linalg.eigvalsh(truth("hessian").double())
    for power in (1, 2, 3):
        each = torch.tensor([float(w @ n**power) for n, w in found.quadratures])
        error = float(each.std()) / len(each) ** 0.5
        assert abs(found.moment(power) - float((true**power).mean())) < 4 * error
        assert error < 0.5 * float((true.abs() ** power).mean())
    grid, density = found.density()
    low = float(torch.trapezoid(density[grid < -0.05 * true.abs().max()], grid[grid < -0.05 * true.abs().max()]))
    assert low == pytest.approx(float((true < -0.05 * true.abs().max()).double().mean()), abs=0.05)


def test_groups_that_are_known_stop_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Curvature.products

    def products(self: Curvature, blocks: list[tuple[str, ...]], vectors: list[Tensor]) -> list[Tensor]:
        asked.append(len(blocks))
        return original(self, blocks, vectors)

    monkeypatch.setattr(Curvature, "products", products)
    made = prepared("mixer")
    wanted = weight_groups(made.graph)
    spectra(curvature(made, data=dataset(3)), wanted, steps=12, tolerance=0.01)
    assert asked[0] == len({g.weights for g in wanted})
    assert asked[-1] < asked[0]
    assert asked == sorted(asked, reverse=True)
    assert len(asked) < 12


# ------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_answered_is_said() -> None:
    with pytest.raises(UsageError, match="Expected labels"):
        curvature(plain(), "hessian", data=some(labelled=False))
    look = curvature(prepared("tuple_output"), "hessian", data=dataset(2).labelled([0, 9]))
    with pytest.raises(DataError, match="labels below"):
        traces(look, weight_groups(prepared("tuple_output").graph), probes=2)
    assert traces(
        curvature(prepared("partial_writes"), data=dataset(2)), weight_groups(prepared("partial_writes").graph)
    )


class _Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 8), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1).round())


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
def test_a_layer_that_outputs_do_not_feel_has_curvature_zero(matrix: Matrix) -> None:
    made = prepare(capture(_Cut().eval(), images(2)))
    wanted = weight_groups(made.graph)
    found = traces(curvature(made, matrix), wanted, probes=4)
    assert float(found.trace[0]) == 0
    assert float(found.trace[1]) > 0
    top = spectra(curvature(made, matrix), wanted, steps=4)
    assert top[0].eigenvalues == [0.0]
    assert top[1].eigenvalues[0] > 0


class _Root(nn.Module):
    """The derivative of the square root is infinite at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 8), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((0 * self.conv(x)).square().sqrt().flatten(1))


def test_a_curvature_that_is_not_finite_is_blamed_on_its_layer() -> None:
    made = prepare(capture(_Root().eval(), images(2)))
    with pytest.raises(ModelError, match="curvature at conv is not finite"):
        traces(curvature(made), weight_groups(made.graph), probes=2)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"partial_writes"}))
def test_every_network_has_traces_and_spectra(name: str) -> None:
    made = prepared(name)
    look, wanted = curvature(made, batch=2, data=dataset(2)), weight_groups(made.graph)
    found = traces(look, wanted, probes=2)
    assert bool((found.trace >= 0).all())
    top = spectra(look, wanted, steps=2)
    assert all(s.eigenvalues[0] <= 1.5 * float(t) * 20 + 1e-6 for s, t in zip(top, found.trace, strict=True))
