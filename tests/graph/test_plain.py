"""Networks as they come out of training code give what the plain float32 network gives, and stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import images, make
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.graph.capture import Captured, capture


def answer(made: Captured, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([y.flatten() for y in made.graph(x)])


def plain() -> Tensor:
    return answer(capture(make("residual"), images(2)), images(4))


class Around(nn.Module):
    """Somebody's network around a wrapped one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel,
    torch.compile,
    lambda net: nn.DataParallel(torch.compile(net)),
    lambda net: Around(nn.DataParallel(net)),
    lambda net: Around(torch.compile(net)),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_wrappers_change_nothing(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    found = capture(wrapped(make("residual")), images(2))
    assert torch.equal(answer(found, images(4)), plain())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", WRAPPERS[:3])
def test_wrappers_are_in_no_name(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    def names(made: Captured) -> list[str]:
        return [str(n.meta.get("layer", n.target)) for n in made.graph.graph.nodes]

    assert names(capture(wrapped(make("residual")), images(2))) == names(capture(make("residual"), images(2)))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_cast_in_a_copy_and_said(kind: torch.dtype) -> None:
    network = make("residual").to(kind)
    network.stem.float()  # mixed
    before = {k: (v, v.clone()) for k, v in network.state_dict(keep_vars=True).items()}
    with pytest.warns(UserWarning, match=f"weights in {str(kind).removeprefix('torch.')}"):
        found = capture(network, images(2))
    after = network.state_dict(keep_vars=True)
    assert all(after[k] is v and torch.equal(v, copy) for k, (v, copy) in before.items())
    assert {t.dtype for t in found.graph.buffers()} == {torch.float32}
    reference = make("residual").to(kind).float()
    with torch.no_grad():
        assert float((answer(found, images(4)) - reference(images(4)).flatten()).abs().max()) < 0.01


def test_images_in_half_are_cast_too() -> None:
    found = capture(make("residual"), images(2).half())
    assert found.example.dtype == torch.float32


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, images(2))])
@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused_with_the_remedy(compiled: Callable[[nn.Module], nn.Module]) -> None:
    for network, place in [(compiled(make("residual")), ""), (Around(compiled(make("residual"))), "'inner'")]:
        with pytest.raises(ModelError, match="Give the module that was passed to") as caught:
            capture(network, images(2))
        assert place in str(caught.value)


def test_a_network_without_values_is_refused() -> None:
    with pytest.raises(ModelError, match=r"with weights, found none in 'stem.weight'"):
        capture(make("residual").to("meta"), images(2))
    with pytest.raises(ModelError, match=r"with weights, found none in '0.weight'"):
        capture(nn.Sequential(nn.LazyConv2d(4, 3)), images(2))


class HalfInside(nn.Module):
    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.conv, self.head = kind, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().to(self.kind) * torch.linspace(0, 1, 6, dtype=self.kind)[:, None, None]
        return self.head(y.mean((2, 3)).to(x.dtype))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_part_in_half_is_computed_in_float32_and_said(kind: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=f"computes a part in {str(kind).removeprefix('torch.')}"):
        found = capture(HalfInside(kind).eval(), images(2))
    with torch.no_grad():
        torch.testing.assert_close(found.graph(images(4))[0], HalfInside(torch.float32)(images(4)))


def test_a_part_in_double_is_computed_in_float32() -> None:
    found = capture(HalfInside(torch.float64).eval(), images(2))
    with torch.no_grad():
        torch.testing.assert_close(found.graph(images(4))[0], HalfInside(torch.float32)(images(4)))


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), torch.ao.nn.quantized.dynamic.Linear(6, 5))
    with pytest.raises(ModelError, match="found a quantized layer at '1'"):
        capture(network, images(2))


class Named(Tensor):
    """A class that changes no operator, as libraries use to mark tensors."""


class Own(Tensor):
    """A class that computes in a way of its own, as torchao's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def with_weight_of(kind: type[Tensor]) -> nn.Module:
    module = Around(nn.Linear(4, 4)).eval()
    module.inner.weight = nn.Parameter(torch.eye(4).as_subclass(kind))
    return module


def test_tensors_of_a_class_that_changes_nothing_are_taken_as_plain() -> None:
    module, x = with_weight_of(Named), torch.rand(2, 3, 4, 4)
    found = capture(module, x)
    assert torch.allclose(answer(found, x), (x + module.inner.bias).detach().flatten())
    assert {type(p) for p in found.graph.parameters()} <= {nn.Parameter}
    assert isinstance(module.inner.weight, Named)


def test_tensors_of_a_class_that_computes_otherwise_are_refused() -> None:
    with pytest.raises(ModelError, match=r"plain float tensors in the model, 'inner.weight' is a test_plain.Own. Give"):
        capture(with_weight_of(Own), torch.rand(2, 3, 4, 4))


class Counting(nn.Module):
    """Counts its calls and keeps a running mean, in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make("residual")
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("both", torch.arange(6.0))
        self.register_buffer("first", self.both[:3])

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        return self.inner(x)


def test_what_a_model_writes_down_while_it_runs_stays_as_it_was() -> None:
    model = Counting().eval()
    before, own = {name: b.clone() for name, b in model.named_buffers()}, dict(model.named_buffers())
    found = capture(model, images(2))
    assert torch.equal(answer(found, images(4)), plain())
    for name, buffer in model.named_buffers():
        assert buffer is own[name]
        assert torch.equal(buffer, before[name])
    assert model.first.data_ptr() == model.both.data_ptr()
    model(images(1))
    assert float(model.calls) == 1
