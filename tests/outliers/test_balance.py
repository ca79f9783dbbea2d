"""Channels of very different size are balanced where that lowers the loss and nowhere else; effects."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.given.images import load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.graph.axes import read_outputs
from bitwright.graph.student import Student, insert_quantizers
from bitwright.outliers import balance as module
from bitwright.outliers.balance import own_quantizers
from bitwright.outliers.effects import see_gradients
from bitwright.quant.scheme import Scheme
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate


class Wide(nn.Module):
    """Three of 16 channels of the first convolution are 100 times larger, which the second takes back."""

    def __init__(self, factor: float = 100.0, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.head, self.act = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 10, 1), act()
        with torch.no_grad():
            self.stem.weight *= 2
            self.stem.weight[:3] *= factor
            self.second.weight[:, :3] /= factor
            self.head.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.third(self.act(self.second(self.act(self.stem(x)))))))


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def decibels(network: nn.Module, model: Student) -> float:
    x = noise(32, seed=1)
    with torch.no_grad():
        expected, found = network(x), model(x)
    signal = (expected - expected.mean(0)).square().sum()
    return float(10 * torch.log10(signal / (expected - found).square().sum()))


def unbalanced(network: nn.Module, **how: object) -> Student:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it holds more error than signal
        patch.setattr(module, "ROUNDS", 0)
        return bw.quantize(network, noise(48), "mse", **how)


@pytest.mark.parametrize(
    ("act", "runtime"), [(nn.SiLU, "onnxruntime"), (nn.ReLU, "onnxruntime"), (nn.GELU, "openvino")]
)
def test_wide_channels_cost_nothing_any_more(act: type[nn.Module], runtime: str) -> None:
    network, alike = Wide(act=act).eval(), Wide(1.0, act=act).eval()
    found = bw.quantize(network, noise(48), "mse", runtime=runtime)
    assert found.result["balanced"]
    assert decibels(network, unbalanced(network, runtime=runtime)) < 12
    assert decibels(network, found) > decibels(alike, unbalanced(alike, runtime=runtime)) - 3


def test_networks_that_do_not_need_it_stay_as_they_are() -> None:
    network = Wide(1.0).eval()
    found, plain = bw.quantize(network, noise(48), "mse"), unbalanced(network)
    assert "balanced" not in found.result
    with torch.no_grad():
        assert torch.equal(found(noise(8)), plain(noise(8)))


@pytest.mark.filterwarnings("ignore:The loss from the float network", "ignore:Output ")
def test_a_change_that_does_not_lower_the_loss_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 0.0)
    assert "balanced" not in bw.quantize(Wide().eval(), noise(48), "mse").result


def test_the_float_network_runs_once_for_all_losses() -> None:
    images, run = load_images(noise(8), None), Run(seed=0, batch=4)
    teacher = prepare_teacher(as_model(Wide()), images)
    student = insert_quantizers(teacher, Scheme(weights=3, activations=4))
    trial = module._Trial(lambda _: student, images, images, Calibrate(), run, [])
    trial.readings = read_outputs(teacher.graph, noise(8), teacher.outputs)
    student = Calibrate().run(student, teacher, images, run)
    alone = {}
    for roles in (set(), {"weight"}, {"activation", "parameter"}):
        with module.let_pass(student, roles), torch.no_grad():
            found = [student.flat(x) for x in noise(8).split(4)]
            expected = [list(teacher.graph(x)) for x in noise(8).split(4)]
        each = [distance_of_outputs(f, e, trial.readings).sum() for f, e in zip(found, expected, strict=True)]
        alone[frozenset(roles)] = float(sum(each)) / 8
    passes = []
    handle = teacher.graph.register_forward_hook(lambda *_: passes.append(1))
    losses = trial.losses(student, teacher, [set(roles) for roles in alone])
    handle.remove()
    assert losses == pytest.approx(list(alone.values()))
    assert len(set(losses)) == 3
    assert len(passes) == 2


@pytest.mark.parametrize(("batch", "limit", "passes"), [(8, 1 << 20, 0), (4, 1 << 20, 0), (8, 1, 1), (4, 1, 2)])
def test_the_loss_takes_the_answers_of_the_pass_that_gave_the_ranges(
    batch: int, limit: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are small."""
    monkeypatch.setattr(module, "ANSWERS_BYTES", limit)
    images, run = load_images(noise(8), None), Run(seed=0, batch=batch)
    teacher = prepare_teacher(as_model(Wide()), images)
    made = lambda network: insert_quantizers(network, Scheme(weights=3, activations=4))  # noqa: E731
    trial = module._Trial(made, images, images, Calibrate(), run, [])
    trial.readings = read_outputs(teacher.graph, noise(8), teacher.outputs)
    seen = []
    handle = teacher.graph.register_forward_hook(lambda *_: seen.append(1))
    found = trial.of(teacher, [])
    handle.remove()
    assert len(seen) == passes
    assert run.beside == ()
    assert found.loss == pytest.approx(trial.losses(found.student, teacher, [{"weight"}])[0])


def test_balanced_networks_are_written_loaded_and_checked(tmp_path: Path) -> None:
    network = Wide().eval()
    model, x = bw.quantize(network, noise(48), "mse", rules=["act_1=w8a16"]), noise(16, seed=2)
    model.save(tmp_path / "run")
    loaded = bw.load(tmp_path / "run")
    assert model.result["balanced"]
    assert model.result["model"]["parameters"] == sum(p.numel() for p in network.parameters())  # without the factors
    assert model.export(tmp_path / "model.onnx", x).agreement == 1.0
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    again = prepare_teacher(as_model(network), load_images(noise(48), None), result=loaded.result)
    assert model.teacher is not None
    ours, theirs = dict(model.teacher.graph.named_buffers()), dict(again.graph.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_four_bit_weights_lose_nothing() -> None:
    network = Wide().eval()
    found = bw.quantize(network, noise(48), "mse", weights=4)
    assert decibels(network, found) > decibels(network, unbalanced(network, weights=4)) + 3


def test_effects_are_what_a_rounded_tensor_adds() -> None:
    """Each tensor alone on its grid, the rest in float, against gradients from many directions."""
    network = Wide(1.0).eval()
    images = load_images(noise(8), None)
    teacher = prepare_teacher(as_model(network), images)
    student = Calibrate().run(insert_quantizers(teacher, Scheme()), teacher, images, Run())
    quantizers = own_quantizers(student)
    found = dict.fromkeys(quantizers, 0.0)

    def see(name: str, value: Tensor, gradient: Tensor) -> None:
        found[name] += float(((quantizers[name](value) - value) * gradient).flatten(1).sum(1).square().sum())

    readings = read_outputs(teacher.graph, noise(1), teacher.outputs)
    see_gradients(teacher.graph, images.batches(8), quantizers, see, readings=readings, probes=100, seed=0)
    with torch.no_grad():
        expected = list(teacher.graph(noise(8)))
        for name, quantizer in quantizers.items():
            alone = copy.deepcopy(teacher.graph)
            node = next(n for n in alone.graph.nodes if n.name == name)
            alone.add_module("alone", quantizer)
            with alone.graph.inserting_after(node):
                call = alone.graph.call_module("alone", (node,))
            node.replace_all_uses_with(call, lambda n, call=call: n is not call)
            alone.recompile()
            measured = float(distance_of_outputs(list(alone(noise(8))), expected, readings).mean())
            assert found[name] / 800 == pytest.approx(measured, rel=0.4), name
