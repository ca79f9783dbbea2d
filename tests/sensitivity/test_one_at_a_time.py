"""One quantized tensor at a time, against networks that are changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import dataset, prepared
from torch import Tensor

from bitwright.curvature.label_free import label_free_scores
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph.points import linear_points
from bitwright.graph.readings import Reading
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.scheme import Rule, Scheme
from bitwright.sensitivity import Choices, MeasuredLoss, OutputDistance, Table
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages import losses
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters
from bitwright.stages.optq import Optq

CHOICES = Choices((3, 8), (4, 16))
LABELS = [0, 2, 1, 1, 3, 0]
NAMES = ["residual", "transformer", "called_twice", "shuffle", "tuple_output", "upsample"]


def some() -> Images:
    return dataset(6)


def calibrated(name: str, weights: int, activations: int, runtime: str = "onnxruntime") -> Student:
    student = insert_quantizers(prepared(name), Scheme(weights=weights, activations=activations, runtime=runtime))
    return Calibrate().run(student, prepared(name), some(), Run())


Look = Callable[[Tensor], tuple[list[Tensor], dict[str, Tensor]]]


def looking(name: str, graph: torch.fx.GraphModule, replace: dict[str, Callable[[Tensor], Tensor]]) -> Look:
    """Runs a graph, some values replaced; its outputs, and what every node yields."""

    def run(x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def keep(node: torch.fx.Node, value: Tensor) -> Tensor | None:
            seen[node.name] = value
            return replace[node.name](value) if node.name in replace else None

        nodes = [n.name for n in graph.graph.nodes if n.op in {"call_function", "placeholder", "get_attr"}]
        return watch(graph, x, dict.fromkeys(nodes, keep)), seen

    return run


@cache
def changed(name: str, runtime: str = "onnxruntime") -> dict[tuple[str, str, int], Look]:
    """Every variable at every number of bits: the float network with that tensor quantized by hand."""
    found: dict[tuple[str, str, int], Look] = {}
    teacher = prepared(name).graph
    for bits in CHOICES.weights:
        student = calibrated(name, bits, 4, runtime)
        for path, quantizer in parameters(student.graph, "weight"):
            twin = copy.deepcopy(teacher)
            owner, _, leaf = path.rpartition(".")
            twin.get_submodule(owner)._buffers[leaf] = quantizer(teacher.get_buffer(path))
            found["weights", quantizer.name, bits] = looking(name, twin, {})
    for bits in CHOICES.activations:
        student = calibrated(name, 8, bits, runtime)
        for key, quantizer in student.graph.named_children():
            if getattr(quantizer, "role", None) == "activation":
                calls = [n for n in student.graph.graph.nodes if n.target == key]
                replace = {n.args[0].name: quantizer for n in calls}
                found["activations", quantizer.name, bits] = looking(name, teacher, replace)
    return found


def kl(a: Tensor, b: Tensor) -> Tensor:
    """From the probabilities of scores, [N]; the mean over positions of a map."""
    p, q = a.double().softmax(1), b.double().softmax(1)
    return (p * (p.log() - q.log())).sum(1).flatten().view(len(a), -1).mean(1)


def check(found: Table, expected: dict[tuple[str, str, int], float]) -> None:
    halves = {"weights": found.weights, "activations": found.activations}
    got = {(h, n, b): v for h, rows in halves.items() for n, row in rows.items() for b, v in row.items()}
    assert set(got) == set(expected)
    scale = max(abs(v) for v in expected.values())
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=2e-3, abs=2e-6 * scale), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [6, 4])
def test_measured_loss_is_that_of_networks_changed_by_hand(name: str, batch: int) -> None:
    found = MeasuredLoss().measure(prepared(name), some(), CHOICES, Run(batch=batch))
    x = some().batch(range(6))
    reference = looking(name, prepared(name).graph, {})(x)[0]
    expected = {}
    for key, network in changed(name).items():
        total = 0.0
        for a, b in zip(reference, network(x)[0], strict=True):
            if name == "upsample":  # a map of probabilities of two classes
                p, q = a.double(), b.double()
                total += float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
            else:
                total += float(kl(a, b).mean())
        expected[key] = total
    check(found, expected)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_weights_are_rounded_as_closed_form_stages_do(name: str) -> None:
    choices = Choices((3, 4), (), refine=(Optq(),))
    found = MeasuredLoss().measure(prepared(name), some(), choices, Run())
    teacher, x, expected = prepared(name).graph, some().batch(range(6)), {}
    for bits in choices.weights:
        student = insert_quantizers(prepared(name), Scheme(weights=bits, activations=None))
        student = Optq().run(Calibrate().run(student, prepared(name), some(), Run()), prepared(name), some(), Run())
        for path, quantizer in parameters(student.graph, "weight"):
            twin = copy.deepcopy(teacher)
            biases = [
                n.args[2].target for n in teacher.graph.nodes if _reads(n, path) and len(n.args) > 2 and n.args[2]
            ]
            for stored, value in [
                (path, quantizer(student.graph.get_buffer(path))),
                *((bias, student.graph.get_buffer(bias)) for bias in biases),
            ]:
                owner, _, leaf = stored.rpartition(".")
                twin.get_submodule(owner)._buffers[leaf] = value
            outputs = zip(watch(teacher, x, {}), watch(twin, x, {}), strict=True)
            expected["weights", quantizer.name, bits] = sum(float(kl(a, b).mean()) for a, b in outputs)
    check(found, expected)
    plain = MeasuredLoss().measure(prepared(name), some(), Choices((3, 4), ()), Run())
    assert any(found.weights[layer][3] != pytest.approx(row[3], rel=0.05) for layer, row in plain.weights.items())


def _reads(node: torch.fx.Node, path: str) -> bool:
    return len(node.args) > 1 and isinstance(node.args[1], torch.fx.Node) and node.args[1].target == path


def test_tensors_on_one_scale_are_one_variable() -> None:
    """Inputs and output of a concatenation, where the target puts them on one grid."""
    choices = Choices(CHOICES.weights, CHOICES.activations, Scheme(runtime="generic"))
    found = MeasuredLoss().measure(prepared("dense"), some(), choices, Run(batch=6))
    x = some().batch(range(6))
    (reference,), _ = looking("dense", prepared("dense").graph, {})(x)
    networks = changed("dense", "generic")
    check(found, {key: float(kl(reference, network(x)[0][0]).mean()) for key, network in networks.items()})
    apart = MeasuredLoss().measure(prepared("dense"), some(), CHOICES, Run(batch=6))
    assert len(found.activations) < len(apart.activations)


def test_with_labels_it_is_the_cross_entropy_that_is_added() -> None:
    data = some().labelled(LABELS)
    found = MeasuredLoss(labels=True).measure(prepared("residual"), data, CHOICES, Run(batch=4))
    x, y = some().batch(range(6)), torch.tensor(LABELS)
    (reference,), _ = looking("residual", prepared("residual").graph, {})(x)
    expected = {}
    for key, network in changed("residual").items():
        expected[key] = float(F.cross_entropy(network(x)[0][0], y) - F.cross_entropy(reference, y))
    halves = {"weights": found.weights, "activations": found.activations}
    for (half, layer, bits), value in expected.items():
        assert halves[half][layer][bits] == pytest.approx(value, abs=2e-6)
    assert min(expected.values()) < 0 < max(expected.values())
    with pytest.raises(UsageError, match="Expected labels"):
        MeasuredLoss(labels=True).measure(prepared("residual"), some(), CHOICES, Run())


def test_the_error_is_that_of_the_mean_over_images() -> None:
    found = MeasuredLoss().measure(prepared("residual"), some(), CHOICES, Run(batch=4))
    x = some().batch(range(6))
    (reference,), _ = looking("residual", prepared("residual").graph, {})(x)
    each = kl(reference, changed("residual")["weights", "conv", 3](x)[0][0])
    assert found.facts["error"]["weights"]["conv"]["3"] == pytest.approx(float(each.std()) / 6**0.5, rel=1e-2)


@pytest.mark.parametrize("points", ["last", "mean", "hessian"])
@pytest.mark.parametrize("distance", ["operator", "cosine", "kl", "mse"])
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_distances_at_interest_points(name: str, distance: str, points: str) -> None:
    teacher, x = prepared(name), some().batch(range(6))
    found = OutputDistance(distance, points).measure(teacher, some(), CHOICES, Run(batch=6))  # type: ignore[arg-type]
    at = linear_points(teacher.graph, teacher.example)
    weights = torch.full((len(at),), 1 / len(at), dtype=torch.float64)
    if points == "last":
        at, weights = at[-1:], torch.ones(1, dtype=torch.float64)
    if points == "hessian":
        trace = label_free_scores(teacher.graph, [x], at, total=6).layer_trace.double()
        weights = trace / trace.sum()
    _, reference = looking(name, teacher.graph, {})(x)
    expected = {}
    for key, network in changed(name).items():
        _, seen = network(x)
        total = 0.0
        for weight, point in zip(weights.tolist(), at, strict=True):
            a, b = reference[point.node].double(), seen[point.node].double()
            conv = point.layer in {"stem", "conv", "patches"}
            kind = distance if distance != "operator" else "mse" if conv else "cosine"
            each = []
            for i in range(6):
                if kind == "cosine":
                    cosine = float(a[i].flatten() @ b[i].flatten() / (a[i].norm() * b[i].norm()))
                    each.append(max((1 - cosine) / 2, 0.0))
                elif kind == "mse":
                    scale = float(a[i].square().mean()) if len(at) > 1 else 1.0
                    each.append(float((a[i] - b[i]).square().mean()) / scale)
                else:
                    last = 0 if conv else -1
                    p, q = a[i].softmax(last), b[i].softmax(last)
                    each.append(float((p * (p / q).log()).sum(last).mean()))
            total += weight * sum(each) / 6
        expected[key] = total
    check(found, expected)
    assert sum(found.facts["points"].values()) == pytest.approx(1)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_windows_of_an_image_are_one_row(distance: str) -> None:
    """Images and windows share an axis there, window after window of each image."""
    teacher, x = prepared("shifted_window"), some().batch(range(6))
    point = next(p for p in linear_points(teacher.graph, teacher.example) if p.layer == "qkv")
    assert point.image_after_image
    _, reference = looking("shifted_window", teacher.graph, {})(x)
    assert len(reference[point.node]) == 6 * 4
    measure = OutputDistance(distance, "mean")  # type: ignore[arg-type]
    other = reference[point.node] + torch.randn_like(reference[point.node])
    found = measure._distance("linear", other, reference[point.node], point, 6, relative=False)
    a, b = (t.reshape(6, -1).double() for t in (other, reference[point.node]))
    expected = {"cosine": (1 - F.cosine_similarity(a, b)) / 2, "mse": (a - b).square().mean(1)}
    torch.testing.assert_close(found, expected[distance])
    table = measure.measure(teacher, some(), CHOICES, Run(batch=6))
    assert all(row[3] > row[8] > 0 for row in table.weights.values())


@pytest.mark.parametrize("name", ["mixer", "token_norm", "conv1d"])
@pytest.mark.parametrize("distance", ["operator", "kl"])
def test_distances_do_not_depend_on_the_batches(name: str, distance: str) -> None:
    one, two = (
        OutputDistance(distance, "mean").measure(prepared(name), some(), CHOICES, Run(batch=b))  # type: ignore[arg-type]
        for b in (6, 2)
    )
    for layer, row in one.weights.items():
        assert row == pytest.approx(two.weights[layer], rel=1e-3)


def test_rules_do_not_hide_variables() -> None:
    rules = Choices((3,), (4,), Scheme(rules=(Rule.parse("stem=wfloat"), Rule.parse("conv=a8"))))
    found = MeasuredLoss().measure(prepared("residual"), some(), rules, Run())
    assert found.weights == MeasuredLoss().measure(prepared("residual"), some(), Choices((3,), (4,)), Run()).weights


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = prepared("residual")
    before = {n: t.clone() for n, t in teacher.graph.named_buffers()}
    MeasuredLoss().measure(teacher, some(), CHOICES, Run())
    assert all(torch.equal(t, before[n]) for n, t in teacher.graph.named_buffers())


def test_the_loss_of_maps_is_taken_along_their_classes_wherever_they_lie() -> None:
    ours, theirs = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = losses.kl_divergence(ours, theirs).double()
    for axis in (1, 2, 3):
        moved = [[x.movedim(1, axis)] for x in (ours, theirs)]
        found = distance_of_outputs(*moved, [Reading("scores", axis)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    boxes = distance_of_outputs([ours], [theirs], [Reading("values")])
    torch.testing.assert_close(boxes, losses.relative_error(ours, theirs).double())
    still = [torch.ones(7, 3)]
    assert distance_of_outputs([ours, *still], [theirs, *still], [Reading("values"), Reading("constant")]).shape == (2,)
    halves = [x.repeat_interleave(2, 0) for x in (ours, theirs)]  # an output with two rows for each image
    both = distance_of_outputs([ours, halves[0]], [theirs, halves[1]], [Reading("values")] * 2)
    torch.testing.assert_close(both, 2 * boxes)
