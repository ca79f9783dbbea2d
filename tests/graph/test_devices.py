"""A network and all that it makes on the way lie on one device."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import bitwright as bw
from bitwright.graph.devices import device_of, exact_float32, place_on
from tests import cases

pytestmark = pytest.mark.filterwarnings("ignore:The optimisation did not lower")


def test_what_is_made_on_the_way_moves_too() -> None:
    graph = fx.Graph()
    made = graph.call_function(torch.ops.aten.zeros.default, ([2, 3],), {"device": torch.device("cpu")})
    there = graph.call_function(torch.ops.aten.to.device, (made, torch.device("cpu"), torch.float64))
    graph.output([graph.call_module("linear", (there,))])
    network = fx.GraphModule({"linear": nn.Linear(3, 1).double()}, graph)
    place_on(network, "meta")
    assert device_of(network).type == network()[0].device.type == "meta"
    assert network.code.count("'meta'") == 2


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cudnn.allow_tf32
    assert before, "PyTorch's own choice has changed"

    @exact_float32()
    def seen() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    assert seen() == (False, False)
    assert torch.backends.cudnn.allow_tf32 == before


# ------------------------------------------------------------------------------- what the caller has switched


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


SWITCHED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": without_gradients,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "double": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
}


IMAGES, OTHERS = cases.images(16), cases.images(16, seed=1)


def learned(model: nn.Module) -> tuple[Tensor, float]:
    """Answers after a few steps, and a figure of an evaluation."""
    quantized = bw.quantize(model, IMAGES, "eptq", weights=4, steps=3, precision="float32", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        loaded = bw.load(quantized.save(Path(folder) / "run"))
    return loaded(OTHERS), quantized.evaluate(OTHERS, progress=False)["fidelity"]["kl"]


@pytest.fixture(scope="module")
def usual() -> tuple[Tensor, float]:
    return learned(cases.make("conv_bn_relu6"))


@pytest.mark.parametrize("name", SWITCHED)
def test_what_the_caller_has_switched_changes_nothing(name: str, usual: tuple[Tensor, float]) -> None:
    model = cases.make("conv_bn_relu6")
    with SWITCHED[name]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        answers, loss = learned(model)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    assert answers.dtype == torch.float32
    assert torch.equal(answers, usual[0])
    assert loss == usual[1]


def test_a_model_made_in_inference_mode_is_optimised(usual: tuple[Tensor, float]) -> None:
    with torch.inference_mode():
        model = cases.make("conv_bn_relu6")
    assert torch.equal(learned(model)[0], usual[0])


def test_the_callers_random_numbers_go_on() -> None:
    model = cases.make("conv_bn_relu6")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    learned(model)
    assert torch.equal(torch.rand(3), expected)


def test_threads_that_quantize_at_once_get_what_each_gets_alone(usual: tuple[Tensor, float]) -> None:
    found: list[Tensor] = []
    models = [cases.make("conv_bn_relu6") for _ in range(2)]
    threads = [threading.Thread(target=lambda m=model: found.append(learned(m)[0])) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(answers, usual[0]) for answers in found)
