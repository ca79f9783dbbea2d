"""Legal constructs around operators change nothing: the same values as the network without them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import dataset, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitwright as bw
from bitwright.errors import ModelError
from bitwright.graph import ops
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare


class Guarded(nn.Module):
    """A part of the forward runs inside something that changes nothing in evaluation."""

    def __init__(self, around: Callable[[], Any] = contextlib.nullcontext) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.around, self.conv, self.head = around, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def inner(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().square()

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            x = self.inner(x)
            with self.around():
                x = x + 1
        return self.head(x.mean((2, 3)))


class Checkpointed(Guarded):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((checkpoint(self.inner, x, use_reentrant=False) + 1).mean((2, 3)))


class Decorated(Guarded):
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def inner(self, x: Tensor) -> Tensor:
        return super().inner(x)


class Cast(Guarded):
    def inner(self, x: Tensor) -> Tensor:
        x = super().inner(x.to(torch.float32).float())
        return x.type_as(self.conv.weight).to(x).contiguous().to(x.device)


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "autocast off": lambda: Guarded(lambda: torch.autocast("cpu", enabled=False)),
    "autocast on": lambda: Guarded(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast of a GPU": lambda: Guarded(lambda: torch.amp.autocast("cuda", enabled=False)),
    "no_grad": lambda: Guarded(torch.no_grad),
    "enable_grad": lambda: Guarded(torch.enable_grad),
    "set_grad_enabled": lambda: Guarded(lambda: torch.set_grad_enabled(True)),
    "inference_mode": lambda: Guarded(torch.inference_mode),
    "record_function": lambda: Guarded(lambda: torch.profiler.record_function("part")),
    "checkpoint": Checkpointed,
    "decorated": Decorated,
    "cast": Cast,
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_nothing_costs_nothing(name: str) -> None:
    expected, found = (prepare(capture(net.eval(), images(2))) for net in (Guarded(), HARMLESS[name]()))
    assert [ops.base_name(n) for n in found.graph.graph.nodes] == [ops.base_name(n) for n in expected.graph.graph.nodes]
    assert torch.equal(found.graph(images(3))[0], expected.graph(images(3))[0])


def test_saved_programs_with_graphs_inside(tmp_path: Path) -> None:
    network = HARMLESS["autocast off"]().eval()
    program = torch.export.export(network, (images(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert any(n.op == "get_attr" for n in program.graph.nodes)
    torch.testing.assert_close(capture(program, images(2)).graph(images(3))[0], network(images(3)))


def standardised(weight: Tensor) -> Tensor:
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias)


class Normed(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv, norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class ByImage(nn.Module):
    """Instance normalisation, written as a batch norm of one example that holds all images."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
        return F.batch_norm(flat, None, None, training=True).reshape(x.shape)


def test_standardised_weights_are_computed_once() -> None:
    torch.manual_seed(31)
    network = Normed(Standardised(3, 6, 3), nn.Identity()).eval()
    made = prepare(capture(network, images(2)))
    (conv,) = (n for n in made.graph.graph.nodes if ops.base_name(n) == "conv2d")
    stored = dict(made.graph.named_buffers())
    torch.testing.assert_close(
        stored[str(conv.args[1].target)].contiguous(), standardised(network.conv.weight).detach()
    )
    with torch.no_grad():
        torch.testing.assert_close(made.graph(images(5))[0], network(images(5)))


@pytest.mark.parametrize(
    "norm", [ByImage(), nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, True, track_running_stats=True)]
)
def test_norms_by_image(norm: nn.Module) -> None:
    torch.manual_seed(31)
    network = Normed(nn.Conv2d(3, 6, 3), norm).eval()
    made = prepare(capture(network, images(2)))
    with torch.no_grad():
        torch.testing.assert_close(made.graph(images(5))[0], network(images(5)))


def test_a_norm_of_the_batch_is_refused_by_name() -> None:
    network = Normed(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    with pytest.raises(ModelError, match="batch norm 'norm', found those of the batch"):
        capture(network, images(3))


class Bounded(nn.Module):
    def __init__(self, bounded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bounded, self.conv, self.head = bounded, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.register_buffer("high", torch.tensor(float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((torch.clamp(y, max=self.high) if self.bounded else y).mean((2, 3)))


def test_a_bound_may_be_infinite() -> None:
    free, bounded = (bw.quantize(Bounded(b).eval(), dataset(), "mse")(images(4)) for b in (False, True))
    torch.testing.assert_close(bounded, free, atol=0.02, rtol=0)


class Sized(nn.Module):
    """Reads a stored size as plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.register_buffer("size", torch.tensor([5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(F.interpolate(x, self.size.tolist())).mean((2, 3)))


def test_numbers_read_from_stored_tensors() -> None:
    network = Sized().eval()
    made = prepare(capture(network, images(2)))
    with torch.no_grad():
        torch.testing.assert_close(made.graph(images(5))[0], network(images(5)))


def named(name: str) -> nn.Module:
    torch.manual_seed(23)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.add_module(name, nn.Conv2d(4, 6, 3))
    network.add_module("last", nn.Conv2d(6, 2, 3))
    return network.eval()


NAMES = ["graph", "it's", 'say"hi"', "a\nb", "back\\slash", "class", "ä ü", "a/b", "meta", "quantizer_weight_last", " "]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_module_gives_the_same_values(name: str, tmp_path: Path) -> None:
    x = images(3)
    with torch.no_grad():
        expected = bw.quantize(named("plain"), dataset(), "rtn")(x)
        model = bw.quantize(named(name), dataset(), "rtn")
        assert torch.equal(model(x), expected)
        assert torch.equal(bw.load(model.save(tmp_path / "run"))(x), expected)
    assert all("\n" not in layer.name for layer in model.layers)
    if name in NAMES[:4]:
        model.export(tmp_path / "model.onnx")


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (1, 0, 2, 3), (2, 3, 1, 0)])
def test_memory_order_of_a_weight_changes_no_bit(order: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    back = [order.index(i) for i in range(4)]
    with torch.no_grad():
        expected = bw.quantize(network, dataset(), "rtn")(images(3))
        network[0].weight.data = network[0].weight.data.permute(order).contiguous().permute(back)
        network[3].weight.data = network[3].weight.data.t().contiguous().t()
        model = bw.quantize(network, dataset(), "rtn")
        assert torch.equal(model(images(3)), expected)
        assert torch.equal(bw.load(model.save(tmp_path / "run"))(images(3)), expected)


DECIDES = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())
    def forward(self, x):
        x = super().forward(x).mean((2, 3))
        for row in x:
            if row.mean() > 0.1:
                return x * 2
        return x
"""


def test_a_failed_capture_prints_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(DECIDES)
    np.savez(tmp_path / "images.npz", images=images(4).numpy())
    code = "import sys; from bitwright.cli import main; sys.exit(main(sys.argv[1:]))"
    given = [
        "quantize",
        f"{tmp_path}/net.py:Net",
        f"{tmp_path}/images.npz",
        "--recipe",
        "rtn",
        "--out",
        f"{tmp_path}/run",
    ]
    quiet = {k: v for k, v in os.environ.items() if k != "BITWRIGHT_DEBUG"}
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, env=quiet, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 2
    assert [line for line in lines if line.startswith("error:")] == [lines[-1]]
    assert len(lines) <= 5, done.stderr
    assert "net.py:9: if row.mean() > 0.1:" in lines[-1]
