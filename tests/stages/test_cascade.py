"""Layers of few bits rounded one after the other, from what quantized layers give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from cases import CASES, dataset, prepared
from torch import Tensor, nn

import bitwright as bw
from bitwright import zoo
from bitwright.api import prepare_teacher
from bitwright.errors import BitwrightError
from bitwright.given.images import Images
from bitwright.given.inputs import as_model
from bitwright.given.models import load_model
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student, insert_quantizers, weight_of
from bitwright.graph.watch import values_of
from bitwright.pipeline import run_stages
from bitwright.quant.quantizer import Frozen
from bitwright.quant.scheme import Rule, Scheme
from bitwright.recipes import recipe
from bitwright.stages import cascade as module
from bitwright.stages.augment import Views
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.cascade import Cascade
from bitwright.stages.losses import kl_divergence
from bitwright.stages.optq import Optq


def start(teacher: Captured, data: Images, **scheme: object) -> Student:
    student = insert_quantizers(teacher, Scheme(**{"weights": 2, **scheme}))
    student = Calibrate(weights="mse", activations="mse").run(student, teacher, data, Run())
    return Optq(positions=16).run(student, teacher, data, Run())


def after(teacher: Captured, data: Images, scheme: dict | None = None, **stage: object) -> Student:
    return Cascade(**stage).run(start(teacher, data, **(scheme or {})), teacher, data, Run())


def tensors(student: Student) -> dict[str, Tensor]:
    return dict(student.graph.named_buffers())


def test_images_that_nothing_saw_lose_less() -> None:
    network = load_model("zoo:fashion_vit")
    pictures = bw.load_images(zoo.images("fashion")[0], network.preprocessing)
    teacher, fit, x = prepare_teacher(network, pictures[:2]), pictures[:24], pictures[512:544].batch(range(32))
    student = start(teacher, fit)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(float(kl_divergence(student.flat(x)[0], teacher.graph(x)[0]).mean()))
        student = Cascade().run(student, teacher, fit, Run())
    assert losses[1] < 0.6 * losses[0]


@pytest.mark.parametrize("weights", [4, 8, None])
def test_a_network_without_few_bits_is_left_as_it_is(weights: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Walk", None)
    teacher, data = prepared("residual"), dataset(4)
    before = start(teacher, data, weights=weights)
    kept = tensors(before)
    assert all(torch.equal(t, kept[k]) for k, t in tensors(Cascade().run(before, teacher, data, Run())).items())


def test_few_bits_of_activations_are_met_by_weights_of_any() -> None:
    """What activations of 4 bits lose before a layer is made up for in it, though 4 bits are many for its weights."""
    network = load_model("zoo:fashion_cnn")
    pictures = bw.load_images(zoo.images("fashion")[0], network.preprocessing)
    teacher, fit, x = prepare_teacher(network, pictures[:2]), pictures[:24], pictures[512:544].batch(range(32))
    losses = []
    for stage in (Cascade(activations=3), Cascade()):
        student = stage.run(start(teacher, fit, weights=4, activations=4), teacher, fit, Run())
        with torch.no_grad():
            losses.append(float(kl_divergence(student.flat(x)[0], teacher.graph(x)[0]).mean()))
    assert losses[1] < 0.6 * losses[0]


def test_stored_weights_are_what_was_rounded() -> None:
    """Not the rounded values, from which a stage that learns codes could move none in few steps."""
    teacher, data = prepared("residual"), dataset(12)
    student = after(teacher, data)
    stored, quantizer = weight_of(student, next(la.node for la in student.layers if la.name == "conv"))
    weight, step = rewrite.get_tensor(student.graph, stored), quantizer.expanded()[0]
    away = (weight / step - quantizer.codes(weight)).abs()
    assert 0.05 < float(away.mean()) <= float(away.max()) < 0.5


def test_layers_of_more_bits_keep_their_codes() -> None:
    teacher, data = prepared("residual"), dataset(8)
    scheme = {"rules": (Rule.parse("conv=w4"),)}
    one, two = tensors(start(teacher, data, **scheme)), tensors(after(teacher, data, scheme))
    assert {k for k in ("stem.weight", "conv.weight", "head.weight") if torch.equal(one[k], two[k])} == {"conv.weight"}


@pytest.mark.parametrize("name", ["conv_bn_relu6", "transformer", "residual"])
def test_every_layer_or_the_sum_that_it_goes_into_keeps_the_float_networks_mean(name: str) -> None:
    """Of all positions, for the inputs that it has now; biases before they become integers."""
    teacher, data = prepared(name), dataset(12)
    student = after(teacher, data, positions=1000)
    x = data.batch(range(12))
    twins = {n.name: n for n in teacher.graph.graph.nodes}
    sums = 0
    for layer in student.layers:
        if layer.weight is None:
            continue
        users = list(twins[layer.node].users)
        summed = len(users) == 1 and users[0].name.startswith("add") and len(ops.tensor_operands(users[0])) == 2
        sums += summed
        node = users[0].name if summed else layer.node
        (a,), (b,) = (values_of(m.graph, x, [node])[0].values() for m in (student, teacher))
        axes = [0, 2, 3] if a.dim() == 4 else list(range(a.dim() - 1))
        spread = float(b.std())
        torch.testing.assert_close(a.mean(axes), b.mean(axes), rtol=0, atol=0.05 * spread)
    assert sums == {"conv_bn_relu6": 0, "transformer": 2, "residual": 1}[name]


@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_a_layer_makes_up_for_the_error_of_what_is_added_to_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum that ends a residual branch is nearer to the float network's than with a layer that looks at itself."""
    teacher, data = prepared(name), dataset(32)
    x = data.batch(range(32))
    ends = [n.name for n in teacher.graph.graph.nodes if ops.kind(n) == "add" and len(ops.tensor_operands(n)) == 2]
    lost = []
    for beside in (module._beside, lambda *_: None):
        monkeypatch.setattr(module, "_beside", beside)
        student = after(teacher, data, positions=1000, shares=(1.0,))
        pairs = [values_of(m.graph, x, ends[-1:])[0][ends[-1]] for m in (student, teacher)]
        lost.append(float((pairs[0] - pairs[1]).square().mean()))
    assert lost[0] < 0.97 * lost[1]


def test_the_share_is_chosen_on_images_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where held-out images say nothing else, what is best for those that were seen would be the whole way."""
    asked: list[list[float]] = []
    solve = Cascade._solve

    def spy(self: Cascade, layer: object, moments: object, shares: Sequence[float]) -> Iterator[tuple[Tensor, ...]]:
        asked.append(list(shares))
        return solve(self, layer, moments, shares)

    monkeypatch.setattr(Cascade, "_solve", spy)
    after(prepared("residual"), dataset(12))
    assert asked[:6:2] == [[0.0, 0.25, 0.5, 0.75, 1.0]] * 3
    assert asked[1] == [0.0]  # the first layer reads the images, which are the same in both networks but for their grid


@pytest.mark.parametrize("name", sorted(CASES))
def test_it_runs_on_everything_and_leaves_the_teacher_alone(name: str) -> None:
    teacher, data = prepared(name), dataset(4)
    before = {k: v.clone() for k, v in teacher.graph.named_buffers()}
    student = after(teacher, data, positions=3)
    assert all(torch.equal(before[k], v) for k, v in teacher.graph.named_buffers())
    x = data.batch(range(4))
    found = student.flat(x)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, student.freeze().flat(x), strict=True))


@pytest.mark.parametrize("scheme", [{"granularity": "group", "group_size": 2}, {"granularity": "tensor"}])
def test_other_granularities(scheme: dict[str, object]) -> None:
    """Steps of groups grow together; a single step for all channels has none of its own, so the codes stay."""
    teacher, data = prepared("transformer"), dataset(8)
    before, student = tensors(start(teacher, data, **scheme)), after(teacher, data, scheme)
    same = torch.equal(before["mlp.0.weight"], tensors(student)["mlp.0.weight"])
    assert same == (scheme["granularity"] == "tensor")


def test_few_images_for_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Spy(module.Walk):
        def __init__(self, graph: object, batches: list[Tensor]) -> None:
            seen.append(sum(map(len, batches)))
            super().__init__(graph, batches)

    monkeypatch.setattr(module, "Walk", Spy)
    monkeypatch.setattr(module, "MEMORY", 1)
    after(prepared("residual"), dataset(12), views=3)
    assert seen == [module.FEWEST] * 2


@pytest.mark.parametrize(("memory", "views"), [(1 << 40, 4), (1, 1)])
def test_views_are_looked_at_as_far_as_memory_goes(memory: int, views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Spy(module._Batches):
        def __getitem__(self, position: int) -> Tensor:
            seen.append(super().__getitem__(position))
            return seen[-1]

    monkeypatch.setattr(module, "_Batches", Spy)
    monkeypatch.setattr(module, "MEMORY", memory)
    data = dataset(module.FEWEST)
    after(prepared("residual"), data, views=4)
    samples, count = Views(data, views), len(data)
    expected = {row.numpy().tobytes() for row in samples.batch(range(len(samples)))}
    assert {row.numpy().tobytes() for batch in seen for row in batch} == expected
    assert len(expected) > (views - 1) * count
    alone = [samples.batch([view * count + i for view in range(views)]) for i in range(count)]
    assert all(any(torch.equal(batch, each) for each in alone) for batch in seen)  # nothing held out was learned from


@pytest.mark.parametrize("name", ["called_twice", "conv_bn_relu6", "residual", "transformer"])
def test_parts_of_large_images_pass_in_smaller_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of sums differs."""
    teacher, data, sizes, found = prepared(name), dataset(24), [], []

    class Spy(module._Batches):
        def __getitem__(self, position: int) -> Tensor:
            batch = super().__getitem__(position)
            sizes.append(len(batch))
            return batch

    monkeypatch.setattr(module, "_Batches", Spy)
    for most, expected in ((100, 3), (2, 2)):
        monkeypatch.setattr(module, "images_in_pass", lambda *_, most=most: most)
        sizes.clear()
        found.append(tensors(after(teacher, data, positions=10_000)))
        assert max(sizes) == expected
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["called_twice", "conv_bn_relu6", "residual", "shifted_window", "transformer"])
def test_integers_do_not_depend_on_how_many_images_pass_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data, found = prepared(name), dataset(64), []
    for most in (100, 4, 3):
        monkeypatch.setattr(module, "images_in_pass", lambda *_, most=most: most)
        student = after(teacher, data, positions=2).freeze()
        found.append({k: m.codes for k, m in student.graph.named_modules() if isinstance(m, Frozen)})
    for codes in found[1:]:
        assert all(torch.equal(codes[key], found[0][key]) for key in found[0])


@pytest.mark.parametrize("name", ["called_twice", "conv_bn_relu6", "residual", "shifted_window", "transformer"])
def test_how_far_the_float_network_runs_ahead_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data, found = prepared(name), dataset(12), []
    for most in (1, 2, 1000):

        def some(self: module._Ahead, most: int = most) -> list[module._Seen]:
            taken, self._waiting = self._waiting[:most], self._waiting[most:]
            return taken

        monkeypatch.setattr(module._Ahead, "_next", some)
        found.append(tensors(after(teacher, data)))
    assert all(torch.equal(t, other[k]) for other in found[1:] for k, t in found[0].items())


def test_of_the_float_network_little_more_is_held_than_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 convolutions of a large image, 8 positions each, where all outputs of one would be 2 MB."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), *(torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(11))]
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    data, held = bw.load_images(torch.randn(16, 3, 64, 64), None), []
    teacher = prepare_teacher(as_model(network.eval(), None), data)
    run = module._Ahead._run

    def spy(self: module._Ahead, layers: list[module._Seen]) -> None:
        run(self, layers)
        values = [v for n, each in self._walk._values.items() if n.op != "get_attr" for v in each]
        held.append(sum(t.nbytes for t in [*values, *(t for each in self._found.values() for t in each)]))

    monkeypatch.setattr(module._Ahead, "_run", spy)
    after(teacher, data, positions=8)
    assert 0 < max(held) < (2 << 20) / 4


@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
def test_a_stage_that_changed_nothing_is_no_state_to_choose_from() -> None:
    kinds = []
    for weights in (5, 4):
        run, teacher, data = Run(steps=1), prepared("residual"), dataset(8)
        run_stages(recipe("eptq"), insert_quantizers(teacher, Scheme(weights=weights)), teacher, data, run)
        kinds.append([kind for kind, _ in run.history])
    assert kinds == [["calibrate", "optq", "reconstruct"], ["calibrate", "optq", "cascade", "reconstruct"]]


class Divided(nn.Module):
    """Divides by zero: infinite in float, and no number once a dividend is rounded to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.first(x) / (x[:, :1, 1:-1, 1:-1] - x[:, :1, 1:-1, 1:-1]), -1, 1)
        return self.second(y).mean((2, 3))


@pytest.mark.parametrize("activations", [4, 8])
def test_values_that_are_no_numbers_end_in_the_line_that_names_the_layer(activations: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)
    with pytest.raises(BitwrightError, match=r"not finite in 'output' where the float one does not; '.*' is the first"):
        bw.quantize(Divided(), images, "optq", weights=2, activations=activations, progress=False)
