"""The learner: the student's own function at the start, and the student that it leaves behind at the end."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import CASES, dataset, images, prepared
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured, capture
from bitwright.graph.points import expose, linear_points
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant.learned import LearnedActivation, LearnedBias, LearnedWeight, RoundedBias
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.scheme import Rule, Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.learner import Learner, Variables

ROUNDINGS = ["straight-through", "soft"]


def calibrated(name: str, **scheme: object) -> Student:
    """Four bits for weights and five for activations, if not told otherwise."""
    student = insert_quantizers(prepared(name), Scheme(**{"weights": 4, "activations": 5, **scheme}))
    return Calibrate(weights="minmax", activations="minmax").run(student, prepared(name), dataset(6), Run())


@cache
def shared(name: str) -> Student:
    """The same, shared: not changed by any test."""
    return calibrated(name)


def learner_of(name: str, student: Student, rounding: str = "straight-through", **variables: object) -> Learner:
    points = linear_points(prepared(name).graph, prepared(name).example)
    return Learner(student, points, Variables(rounding=rounding, **variables))


def computed(student: Student, learner: Learner, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and values at the points of the student."""
    with torch.no_grad():
        outputs, values = expose(student.graph, [p.node for p in learner.points])(x)
    return list(outputs), list(values)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def randomise(learner: Learner, seed: int = 0) -> None:
    """Moves every variable; soft roundings are decided."""
    generator = torch.Generator().manual_seed(seed)

    def like(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for weight in learner.weights.values():
            soft = weight.rounding == "soft"
            weight.codes.copy_(50 * like(weight.codes).sign() if soft else weight.codes + like(weight.codes))
            weight.step.mul_(1 + 0.1 * like(weight.step).tanh())
        for bias in learner.biases.values():
            bias.bias.add_(0.1 * like(bias.bias))
        for activation in learner.activations.values():
            activation.step.mul_(1 + 0.1 * like(activation.step).tanh())


@pytest.mark.parametrize("name", CASES)
def test_before_a_step_it_computes_what_the_student_computes(name: str) -> None:
    student, x = shared(name), images(3, seed=7)
    learner = learner_of(name, student)
    expected = computed(student, learner, x)
    with torch.no_grad():
        found = learner(x)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert_same(found[0], student.flat(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("squeeze_excite", "onnxruntime"),
        ("tied_weights", "onnxruntime"),
        ("transformer", "generic"),
        ("dense", "generic"),
    ],
)
def test_what_it_leaves_behind_computes_what_it_computed(name: str, runtime: str, rounding: str) -> None:
    student, x = calibrated(name, runtime=runtime), images(3, seed=7)
    learner = learner_of(name, student, rounding)
    before = student.flat(x)
    randomise(learner)
    with torch.no_grad():
        outputs, values = learner(x)
    assert_same(student.flat(x), before)  # as long as it is not told
    learner.absorb(student)
    expected = computed(student, learner, x)
    assert_same(outputs, expected[0])
    assert_same(values, expected[1])
    assert not any(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))
    assert_same(student.freeze().flat(x), outputs)


@pytest.mark.parametrize("name", CASES)
def test_any_network_takes_what_was_learned_and_freezes(name: str) -> None:
    student, x = calibrated(name), images(3, seed=7)
    learner = learner_of(name, student)
    randomise(learner)
    with torch.no_grad():
        outputs, _ = learner(x)
    learner.absorb(student)
    for quantizer in (m for m in student.graph.modules() if isinstance(m, Quantizer)):
        quantizer.validate()
    assert_same(student.flat(x), outputs)
    assert_same(student.freeze().flat(x), outputs)


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_any_granularity(granularity: str) -> None:
    student, x = (
        calibrated("transformer", granularity=granularity, group_size=3 if granularity == "group" else None),
        images(3, seed=7),
    )
    learner = learner_of("transformer", student)
    assert_same(learner(x)[0], student.flat(x))
    randomise(learner)
    outputs, _ = learner(x)
    learner.absorb(student)
    assert_same(student.flat(x), outputs)


def test_biases_of_an_integer_accumulator_are_learned_in_float() -> None:
    """The student rounds them to steps of ``s_x s_w``: at the first layer that is the whole difference."""
    student, x = calibrated("residual", weights=8), images(3, seed=7)
    assert any(isinstance(m, BiasQuantizer) for m in student.graph.modules())
    learner = learner_of("residual", student)
    for moved in (False, True):
        if moved:
            randomise(learner)
            learner.absorb(student)
        quantizer = student.quantizer("quantizer_weight_stem")
        source = next(m for m in student.graph.modules() if isinstance(m, BiasQuantizer) and m.name == "stem").source
        steps = (source.scale * quantizer.scale).view(1, -1, 1, 1)
        with torch.no_grad():
            difference = learner(x)[1][0] - computed(student, learner, x)[1][0]
        assert bool((difference.abs() <= 0.501 * steps + 1e-6).all())
        assert float(difference.abs().max()) > 0


@pytest.mark.parametrize("name", CASES)
def test_all_that_can_be_learned_is_found_once(name: str) -> None:
    student = shared(name)
    learner = learner_of(name, student)
    nodes = [n for n in student.graph.graph.nodes if n.op == "call_function" and ops.base_name(n) in ops.LINEAR]
    weights = {str(n.args[1].args[0].target) for n in nodes}
    biases = {str((n.args[2].args[0] if n.args[2].op == "call_module" else n.args[2]).target) for n in nodes}
    activations = {k for k, m in student.graph.named_children() if isinstance(m, Quantizer) and m.role == "activation"}
    assert set(learner.weights) == weights
    assert set(learner.biases) == biases
    assert set(learner.activations) == activations
    variables = [p for w in learner.weights.values() for p in (w.codes, w.step)]
    variables += [b.bias for b in learner.biases.values()] + [a.step for a in learner.activations.values()]
    assert {id(p) for p in learner.parameters()} == {id(p) for p in variables}
    for node in learner.graph.graph.nodes:
        if node.op == "call_function" and ops.base_name(node) in ops.LINEAR:
            kinds = [type(learner.graph.get_submodule(str(a.target))) for a in node.args[1:3]]
            assert kinds in ([LearnedWeight, LearnedBias], [LearnedWeight, RoundedBias])


@pytest.mark.parametrize("name", ["residual", "transformer", "called_twice", "mixer"])
def test_every_variable_feels_the_outputs(name: str) -> None:
    learner = learner_of(name, shared(name))
    outputs, values = learner(images(6, seed=7))
    torch.stack([t.square().sum() for t in [*outputs, *values]]).sum().backward()
    for key, p in learner.named_parameters():
        assert p.grad is not None, key
        assert bool(torch.isfinite(p.grad).all())
    assert all(bool(b.bias.grad.any()) for b in learner.biases.values())
    assert all(bool(a.step.grad.any()) for a in learner.activations.values())


def test_gradient_of_the_last_bias_is_the_number_of_images() -> None:
    learner = learner_of("residual", shared("residual"))
    learner(images(5, seed=7))[0][0].sum().backward()
    assert learner.biases["head.bias"].bias.grad.tolist() == [5.0] * 4


@pytest.mark.parametrize("wanted", [tuple(i == j for j in range(4)) for i in range(5)], ids=str)
def test_only_what_is_asked_for_is_learned(wanted: tuple[bool, bool, bool, bool]) -> None:
    codes, steps, biases, activations = wanted
    learner = learner_of(
        "residual",
        shared("residual"),
        codes=codes,
        weight_steps=steps,
        biases=biases,
        activation_steps=activations,
    )
    assert {w.codes.requires_grad for w in learner.weights.values()} == {codes}
    assert {w.step.requires_grad for w in learner.weights.values()} == {steps}
    assert {b.bias.requires_grad for b in learner.biases.values()} == {biases}
    assert {a.step.requires_grad for a in learner.activations.values()} == {activations}


@pytest.mark.parametrize("name", ["called_twice", "tied_weights"])
def test_a_shared_weight_is_one_variable_in_both_its_places(name: str) -> None:
    learner, x = learner_of(name, shared(name)), images(3, seed=7)
    weights = learner.of_point()
    places = [i for i, w in enumerate(weights) if weights.count(w) == 2]
    assert len(places) == 2
    assert len(learner.weights) == len(weights) - 1
    before = learner(x)[1]
    weight = weights[places[0]]
    assert weight is not None
    slopes = [torch.autograd.grad(before[i].sum(), weight.step, retain_graph=True)[0] for i in places]
    with torch.no_grad():
        weight.step.mul_(1.5)
    after = learner(x)[1]
    assert all(not torch.equal(before[i], after[i]) for i in places)
    assert all(bool(s.any()) for s in slopes)


def test_weights_that_stay_float_are_no_variables_but_their_biases_are() -> None:
    student = calibrated("residual", rules=(Rule.parse("conv=wfloat"),))
    learner = learner_of("residual", student)
    assert set(learner.weights) == {"stem.weight", "head.weight"}
    assert set(learner.biases) == {"stem.bias", "conv.bias", "head.bias"}
    assert [w is None for w in learner.of_point()] == [False, True, False]
    randomise(learner)
    outputs, _ = learner(images(3, seed=7))
    learner.absorb(student)
    assert_same(student.flat(images(3, seed=7)), outputs)


def test_points_know_their_weights() -> None:
    learner = learner_of("transformer", shared("transformer"))
    twin = {p.layer: w for p, w in zip(learner.points, learner.of_point(), strict=True)}
    assert twin == {k.removesuffix(".weight"): w for k, w in learner.weights.items()}


def test_a_float_share_of_one_leaves_activations_as_they_are() -> None:
    x = images(3, seed=7)
    learner = learner_of("residual", calibrated("residual", runtime="generic"))  # whose biases stay float
    quantized = learner(x)[0][0]
    learner.set_mix(1.0)
    expected = calibrated("residual", activations="float", runtime="generic").flat(x)
    assert_same(learner(x)[0], expected)
    learner.set_mix(0.0, 1.0)
    assert_same(learner(x)[0], expected)
    learner.set_mix(0.0)
    assert torch.equal(learner(x)[0][0], quantized)
    assert not torch.equal(quantized, expected[0])
    learner.set_mix(0.3, 0.2)
    assert all((a.mix, a.drop) == (0.3, 0.2) for a in learner.activations.values())


def test_the_share_of_roundings_that_are_decided() -> None:
    learner = learner_of("residual", shared("residual"), "soft")
    total = sum(w.codes.numel() for w in learner.weights.values())
    h = torch.cat([w.softness().detach().flatten() for w in learner.weights.values()])
    assert learner.share_decided() == sum(v < 1e-3 or v > 1 - 1e-3 for v in h.tolist()) / total
    with torch.no_grad():
        learner.weights["conv.weight"].codes.fill_(50.0)
    left = sum(v < 1e-3 or v > 1 - 1e-3 for v in h.tolist()[:108] + h.tolist()[-16:])
    assert learner.share_decided() == (144 + left) / total
    assert learner_of("residual", shared("residual")).share_decided() == 1


def test_it_is_a_copy_that_shares_tensors() -> None:
    student = calibrated("residual")
    before, code = student.snapshot(), str(student.graph.graph)
    learner = learner_of("residual", student)
    assert rewrite.get_tensor(learner.graph, "conv.weight") is rewrite.get_tensor(student.graph, "conv.weight")
    learner(images(3))[0][0].sum().backward()
    randomise(learner)
    after = student.snapshot()
    assert list(after.tensors) == list(before.tensors)
    assert all(after.tensors[k] is v for k, v in before.tensors.items())
    assert str(student.graph.graph) == code
    assert not any(isinstance(m, LearnedWeight | LearnedActivation | LearnedBias) for m in student.graph.modules())
    learner.absorb(student)
    student.restore(before)
    assert all(student.snapshot().tensors[k] is v for k, v in before.tensors.items())


def test_a_student_without_scales_has_nothing_but_biases_to_learn() -> None:
    student = insert_quantizers(prepared("residual"), Scheme())
    learner = learner_of("residual", student)
    assert not learner.weights
    assert not learner.activations
    assert set(learner.biases) == {"stem.bias", "conv.bias", "head.bias"}
    assert_same(learner(images(3))[0], student.flat(images(3)))


def test_biases_know_how_large_the_output_is_that_they_are_added_to() -> None:
    learner, x = learner_of("residual", shared("residual")), images(6, seed=7)
    values = learner(x)[1]
    learner.measure_outputs([v.detach() for v in values])
    for point, value in zip(learner.points, values, strict=True):
        spread = value.detach().double()
        expected = float((spread - spread.mean()).square().sum() / (spread.numel() - 1)) ** 0.5
        assert learner.biases[f"{point.layer}.bias"].size == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_a_bias_of_a_coarse_step_is_learned_as_it_will_be(name: str) -> None:
    """At 3 and 4 bits, where a bias that is rounded only afterwards moves the outputs."""
    check_coarse_biases(prepared(name))


def test_a_bias_in_two_places_is_learned_on_the_step_of_each() -> None:
    check_coarse_biases(prepare(capture(SharedBias().eval(), images(2))))


def check_coarse_biases(teacher: Captured) -> None:
    student = insert_quantizers(teacher, Scheme(weights=3, activations=4))
    Calibrate(weights="minmax", activations="minmax").run(student, teacher, dataset(6), Run())
    points = linear_points(teacher.graph, teacher.example)
    learner = Learner(student, points, Variables(rounding="straight-through"))
    with torch.no_grad():
        for bias in learner.biases.values():
            bias.bias.add_(0.37 * bias.bias.std() + 0.01)
    x = images(3, seed=5)
    outputs = learner(x)[0]
    outputs[0].sum().backward()
    assert any(b.bias.grad is not None and b.bias.grad.any() for b in learner.biases.values())
    learner.absorb(student)
    assert_same([o.detach() for o in outputs], student.flat(x))


class SharedBias(nn.Module):
    """A layer with a bias in two places whose inputs differ in size, so that the bias has two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.stem(x)))) * 7
        return self.head(F.relu(self.twice(x)).mean((2, 3)))
