"""The captured graph computes what the model computes, names what its user knows, and refuses what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, captured, images, make, model, outputs, prepared
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bitwright.errors import BitwrightError, ModelError, step
from bitwright.graph import ops
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.rewrite import get_tensor


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    assert [a.shape for a in expected] == [b.shape for b in found]
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_graph_equals_the_model(name: str, count: int) -> None:
    x = images(count, seed=count)
    with torch.no_grad():
        assert difference(outputs(name, x), captured(name).graph(x)) < 1e-6


def guard_of_a_part(x: Tensor) -> Tensor:
    x[:, 2:4].clamp_(max=4.0)
    return x


def guard_by_assignment(x: Tensor) -> Tensor:
    x[:, 2:4] = x[:, 2:4].clamp(max=4.0)
    return x


def guard_by_a_mask(x: Tensor) -> Tensor:
    x[:, :2].masked_fill_(x[:, 2:4] > 4, 0)
    return x


def guard_of_a_reshaped_tensor(x: Tensor) -> Tensor:
    F.hardtanh_(x.flatten(2), -4, 4)
    return x


def guard_of_one_half(x: Tensor) -> Tensor:
    x.chunk(2, 1)[0].clamp_(-4, 4)
    return x


def guard_seen_in_an_older_view(x: Tensor) -> Tensor:
    part = x[:, :3]
    x.clamp_(-4, 4)
    return part


def guard_of_the_whole(x: Tensor) -> Tensor:
    return x.clamp_(-4, 4)[:, :3]


GUARDS = [guard_of_a_part, guard_by_assignment, guard_by_a_mask, guard_of_a_reshaped_tensor, guard_of_one_half]
GUARDS += [guard_seen_in_an_older_view, guard_of_the_whole]


class Guarded(nn.Module):
    """A box head that limits some of its outputs in place."""

    def __init__(self, guard: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.guard = nn.Conv2d(3, 6, 3, padding=1), guard

    def forward(self, x: Tensor) -> Tensor:
        return self.guard(self.head(x))


@pytest.mark.parametrize("guard", GUARDS)
def test_a_write_that_the_first_images_do_not_show_is_kept(guard: Callable[[Tensor], Tensor]) -> None:
    network, x = Guarded(guard).eval(), images(2)
    large = 100 * x
    with torch.no_grad():
        assert float(network.head(x).abs().max()) < 4 < float(network.head(large).abs().max())
        assert torch.equal(capture(network, x).graph(large)[0], network(large))


@pytest.mark.parametrize("name", CASES)
def test_layers_are_named_by_module_path(name: str) -> None:
    layers = [n for n in captured(name).graph.graph.nodes if n.op == "call_function" and ops.is_float_tensor(n)]
    names = [n.meta["layer"] for n in layers]
    assert len(set(names)) == len(names)
    assert "input" not in names
    linear = {n.meta["layer"] for n in layers if ops.kind(n) == "linear"}
    kinds = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    modules = {path for path, module in model(name).named_modules() if isinstance(module, kinds)}
    assert modules - {"input"} <= linear
    activations = {path for path, m in model(name).named_modules() if isinstance(m, nn.ReLU6 | nn.GELU | nn.LayerNorm)}
    assert activations <= set(names)


@pytest.mark.parametrize("name", CASES)
def test_parameters_keep_their_paths_and_values(name: str) -> None:
    read = {str(n.target) for n in captured(name).graph.graph.nodes if n.op == "get_attr"}
    mine = dict(captured(name).graph.named_buffers())
    for path, value in [*model(name).named_parameters(), *model(name).named_buffers()]:
        if path in read and path != "raw":
            assert torch.equal(mine[path], value), path
            assert mine[path].data_ptr() != value.data_ptr()
    weights = {p for p, _ in model(name).named_parameters() if p.endswith("weight")}
    assert weights <= read


def test_tied_weights_stay_one_target() -> None:
    graph = captured("tied_weights").graph.graph
    convs = [n for n in graph.nodes if ops.base_name(n) == "conv2d"]
    assert [n.meta["layer"] for n in convs] == ["stem", "first", "second"]
    assert [n.args[1].target for n in convs] == ["stem.weight", "first.weight", "first.weight"]
    assert [n.args[2].target for n in convs] == ["stem.bias", "first.bias", "second.bias"]


def test_a_module_called_twice_is_one_target_and_two_layers() -> None:
    convs = [n for n in captured("called_twice").graph.graph.nodes if ops.base_name(n) == "conv2d"]
    assert [n.args[1].target for n in convs] == ["stem.weight", "conv.weight", "conv.weight", "conv_1.weight"]
    names = [n.meta["layer"] for n in convs]
    assert names[:2] == ["stem", "conv"]
    assert names[3] == "conv_1"
    assert names[2].startswith("conv_")


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


class Parametrized(nn.Module):
    """Layers of every kind that PyTorch derives a class from, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.act = nn.PReLU(8)
        self.twice = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.own = Shifted(8, 8, 1)
        self.head = parametrizations.orthogonal(nn.Linear(8, 8))
        for module, name in ((self.act, "weight"), (self.own, "weight"), (self.own, "bias")):
            parametrize.register_parametrization(module, name, Scaled())

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(self.twice(self.twice(self.act(self.stem(x)))))
        return F.linear(y.mean((2, 3)), self.head.weight)


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_parametrized_layers_keep_their_paths() -> None:
    module, x = Parametrized().eval(), images(2)
    found = capture(module, x)
    with torch.no_grad():
        assert difference([module(x)], found.flat(x)) < 1e-6
    linear = [n for n in found.graph.graph.nodes if ops.kind(n) == "linear"]
    assert [n.meta["layer"] for n in linear] == ["stem", "twice", "twice_1", "own", "head"]
    assert [n.args[1].target for n in linear] == [f"{p}.weight" for p in ("stem", "twice", "twice", "own", "head")]
    assert linear[3].args[2].target == "own.bias"
    assert "act" in {n.meta.get("layer") for n in found.graph.graph.nodes}


def test_values_read_past_a_parameter_are_refused_with_the_line() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.data

    with pytest.raises(ModelError, match=r"read past it.*return x \* self.scale.data.*Use .detach\(\) there"):
        capture(Net().eval(), images(2))


def test_capture_leaves_a_training_model_as_it_was() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(F.dropout(self.bn(self.conv(x)), 0.5, self.training)).mean((2, 3))

    net = Net().train()
    net.drop.eval()
    net.bn.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = {k: m.training for k, m in net.named_modules()}
    x = images(4)
    made = capture(net, x)
    assert {k: m.training for k, m in net.named_modules()} == modes
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        assert difference([net.eval()(x)], made.graph(x)) < 1e-6


def test_a_failed_capture_restores_the_mode_too() -> None:
    net = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Dropout()).train()
    with pytest.raises(ModelError):
        capture(net, images(2))
    assert all(m.training for m in net.modules())


def test_one_image_is_enough() -> None:
    x = images(3)
    with torch.no_grad():
        assert difference(outputs("residual", x), capture(make("residual"), x[:1]).graph(x)) < 1e-6


def test_saved_program(tmp_path: Path) -> None:
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(make("residual"), (images(2),), dynamic_shapes=free)
    torch.export.save(program, tmp_path / "net.pt2")
    made = capture(torch.export.load(tmp_path / "net.pt2"), images(2))
    x = images(5)
    with torch.no_grad():
        assert difference(outputs("residual", x), made.graph(x)) < 1e-6
    convs = [n.meta["layer"] for n in made.graph.graph.nodes if ops.kind(n) == "linear"]
    assert convs == ["stem", "conv", "head"]


@pytest.mark.parametrize("batch", [2, 4])
def test_saved_program_of_fixed_batch_is_refused(batch: int) -> None:
    program = torch.export.export(make("norm_then_conv"), (images(batch),))
    assert "fixed batch size" in refusal(program)


def refusal(network: nn.Module | torch.export.ExportedProgram, x: Tensor | None = None) -> str:
    """The one line that says why a network cannot be captured."""
    with pytest.raises(ModelError) as caught:
        capture(network, images(3) if x is None else x)
    text = str(caught.value)
    assert "\n" not in text
    return text


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.mean((2, 3))
        return x.amax((2, 3))


class Baked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1).clone()


class BakedInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x.reshape(2, 3, -1).mean(2)
        return x.reshape(batch, 3)


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("build", "source", "construct"),
    [
        (Decides, "if x.sum() > 0", "depends on the values"),
        (Baked, "return x.view(2, -1).clone()", "batch"),
        (BakedInside, "x.reshape(", ""),
        (Channels, "return self.conv(x)", "5 channels"),
    ],
)
def test_refusal_names_the_source_line(build: Callable[[], nn.Module], source: str, construct: str) -> None:
    text = refusal(build())
    assert source in text
    assert "test_capture.py:" in text
    assert construct in text


def test_two_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert "one image tensor" in refusal(Two())

    program = torch.export.export(Two(), (images(2), images(2)), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2)
    assert "one image tensor" in refusal(program)


@pytest.mark.parametrize(("result", "kind"), [(3.0, "float"), (None, "NoneType"), ("cat", "str"), ({1, 2}, "set")])
def test_an_output_without_tensors_is_refused(result: object, kind: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> object:
            return result

    assert f"found {kind}" in refusal(Odd())


def test_a_loss_is_refused() -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    assert "x.square().mean()" in refusal(Loss())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(poison: float) -> None:
    network = make("conv_bn_relu6")
    network[4].bias.data[1] = poison
    assert "The output of 4 is not finite" in refusal(network)


@pytest.mark.parametrize("like", [True, False])
def test_a_random_model_is_refused(like: bool) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * (torch.rand_like(x) if like else torch.rand(3, 8, 8))

    assert "random" in refusal(Noisy())


def test_a_counting_model_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.mean((2, 3)) + self.calls

    assert "keep state" in refusal(Counting())


def test_outputs_have_names() -> None:
    assert captured("dict_output").outputs == ("logits", "aux")
    assert captured("tuple_output").outputs == ("output_0", "output_1")
    assert captured("residual").outputs == ("output",)


def test_one_output_can_be_kept() -> None:
    x = images(3)
    expected = outputs("dict_output", x)[1]
    kept = capture(make("dict_output"), images(2), output="aux")
    assert kept.outputs == ("aux",)
    assert torch.equal(kept.graph(x)[0], expected)
    assert not [n for n in kept.graph.graph.nodes if n.meta.get("layer") == "head"]
    with pytest.raises(ModelError, match="out of logits, aux, found 'other'"):
        capture(make("dict_output"), images(2), output="other")
    torch.testing.assert_close(prepare(kept).graph(x)[0], expected)


class LayersFirst(nn.Module):
    """Returns its answers, and those of all layers with the layers along the first axis, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = [x.mean((2, 3))]
        for layer in self.layers:
            found.append(layer(found[-1]).relu())
        return {"all": torch.stack(found), "logits": found[-1], "loss": found[-1].mean()}


def test_nothing_is_asked_of_outputs_that_are_not_kept() -> None:
    network, x = LayersFirst().eval(), images(3)
    kept = capture(network, images(2), output="logits")
    assert torch.equal(kept.graph(x)[0], network(x)["logits"])
    with pytest.raises(ModelError, match=r"along the first axis, or keep one output .* output='logits'\."):
        capture(network, images(2))


def test_capture_and_prepare_share_no_memory_with_the_model() -> None:
    network = make("residual")
    made = prepare(capture(network, images(2)))
    before = made.graph(images(3))[0].clone()
    for p in network.parameters():
        p.data.zero_()
    assert torch.equal(made.graph(images(3))[0], before)
    assert torch.isfinite(prepared("residual").graph(images(3))[0]).all()


def test_a_constant_of_the_batch_size_is_captured() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.flatten(1), x.new_zeros(x.shape[0], 2)], 1)

    x = images(5)
    assert torch.equal(capture(Padded(), images(2)).graph(x)[0], F.pad(x.flatten(1), (0, 2)))


def raised(step_inside: Callable[[], object]) -> Exception:
    try:
        with step("The step"):
            step_inside()
    except Exception as error:
        return error
    raise AssertionError


def test_an_unexpected_error_is_one_line_and_says_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = raised(lambda: get_tensor(nn.Module(), "a"))
    assert type(found) is BitwrightError
    assert str(found).startswith("The step failed with an unexpected AttributeError: 'Module' object has")
    assert found.__suppress_context__
    monkeypatch.setenv("BITWRIGHT_DEBUG", "1")
    assert isinstance(raised(lambda: get_tensor(nn.Module(), "a")), AttributeError)


def test_errors_of_the_users_own_code_pass() -> None:
    def own() -> None:
        raise KeyError("a callback's")

    assert isinstance(raised(own), KeyError)
    assert isinstance(raised(lambda: capture(nn.Conv2d(5, 3, 1), images(2))), ModelError)


class Unfilled(nn.Module):
    """Takes memory in every way that PyTorch has."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).clone()
        for taken in (torch.empty_like(total), total.new_empty(total.shape), torch.empty(total.shape)):
            taken[:] = total
            total = total + taken
        rows = torch.empty_strided((total.shape[0], total.shape[1]), (total.shape[1], 1))
        rows[:, :] = total
        return rows


def test_no_memory_is_left_as_it_lay_there() -> None:
    captured = capture(Unfilled(), torch.rand(2, 3, 4, 4))
    names = {ops.base_name(n) for n in captured.graph.graph.nodes}
    assert not {n for n in names if "empty" in n}
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(captured.graph(images)[0], 8 * images.flatten(1))
