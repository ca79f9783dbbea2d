"""Constructs that people write into a forward: those that are legal, and those that no graph can hold.

Each is a function of a network and of images [N, 3, 8, 8].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

Construct = Callable[["Odd", Tensor], Any]


class Odd(nn.Module):
    def __init__(self, *constructs: Construct) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.constructs = constructs
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.lstm = nn.LSTM(6, 3, batch_first=True, bidirectional=True)
        self.wide = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.old = nn.utils.spectral_norm(nn.Linear(6, 5))
        self.register_buffer("size", torch.tensor([5, 4]))
        self.register_buffer("picked", torch.tensor([True, False, True, True, False, False]))
        self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.scale = torch.tensor(0.5)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        found = [construct(self, x) for construct in self.constructs]
        return found[0] if len(found) == 1 else found


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 2


def caught(net: Odd, x: Tensor) -> Tensor:
    try:
        return net.head(net.body(x) + torch.zeros(1, device="no such device"))
    except RuntimeError:
        return net.head(net.body(x))


def filled(net: Odd, x: Tensor) -> Tensor:
    y = net.body(x)
    swapped = torch.empty_like(y)
    swapped[:, :3], swapped[:, 3:] = y[:, 3:], y[:, :3] * 2
    return net.head(swapped)


def assigned(net: Odd, x: Tensor) -> Tensor:
    y = net.head(net.body(x)).clone()
    y[:, torch.tensor([0, 2])] = 0.0
    return y


def remembered(net: Odd, x: Tensor) -> Tensor:
    net.last = net.body(x)
    return net.head(net.last)


def places(x: Tensor) -> Tensor:
    return F.one_hot(torch.arange(5).expand(x.shape[0], -1).clamp(min=1), 5).float().mean(1)


TURNED = torch.arange(8).roll(3)


LEGAL: dict[str, Construct] = {
    "rows by len": lambda net, x: net.body(x).reshape(len(x), -1) + net.head.bias.sum().expand(len(x), 6),
    "rows beside": lambda net, x: torch.cat([net.body(x), torch.ones(len(x), 1)], 1),
    "empty and filled": filled,
    "two norms of a vector": lambda net, x: net.head(net.first(net.body(x)) + net.second(net.body(x))),
    "a divisor of its own": lambda net, x: F.avg_pool2d(net.conv(x).relu(), 2, divisor_override=3),
    "numbers of a buffer": lambda net, x: net.conv(F.interpolate(x, net.size.tolist())),
    "a plain tensor": lambda net, x: net.body(x) * net.scale,
    "a mask that picks": lambda net, x: net.body(x)[:, net.picked],
    "double inside": lambda net, x: net.body(x.double().sub(0.1).float()).softmax(-1, dtype=torch.float64).float(),
    "its own function": lambda net, x: Doubled.apply(net.head(net.body(x))),
    "vmap": lambda net, x: torch.vmap(lambda image: net.head(image.mean((1, 2))))(net.conv(x)),
    "flips": lambda net, x: sum(net.head(net.body(torch.cat([x, x.flip(3)]))).chunk(2)),
    "recurrent": lambda net, x: net.lstm(net.conv(x[:, :, :2, :2]).flatten(2).transpose(1, 2))[0].mean(1),
    "parametrised": lambda net, x: net.wide(x),
    "spectral norm": lambda net, x: net.old(net.body(x)),
    "a failure that is caught": caught,
    "an assignment": assigned,
    "an attribute": remembered,
    "running sums": lambda net, x: net.body(x.cumsum(3) / 4),
    "a table by place": lambda net, x: net.head(net.body(x)) + places(x),
    "the batch's size": lambda net, x: net.body(x) * x.shape[0] / x.shape[0],
    "the input": lambda net, x: x,
    "labels": lambda net, x: net.head(net.body(x)).argmax(1),
    "places that count": lambda net, x: net.conv(x).take_along_dim(TURNED.view(1, 1, 1, 8), dim=-1),
    "one place for all channels": lambda net, x: torch.take_along_dim(net.conv(x), x[:, :1].argmax(2, True), 2),
    "a Kronecker product": lambda net, x: torch.kron(net.conv(x), torch.tensor([[1.0, -0.5]])),
    "shuffled channels": lambda net, x: torch.native_channel_shuffle(net.conv(x), 2),
    "a chain": lambda net, x: torch.linalg.multi_dot([net.body(x), torch.eye(6).roll(1, 0), net.head.weight.T]),
    "differences": lambda net, x: sum(torch.gradient(net.conv(x), spacing=0.5, dim=(2, 3))),
}

REFUSED: dict[str, tuple[Construct, str]] = {
    "a decision": (lambda net, x: net.body(x) if x.mean() > 0 else net.body(-x), "depends on the values"),
    "a number": (lambda net, x: net.body(x)[:, : int(x.abs().sum()) % 3 + 1], "depends on the values"),
    "numpy's number": (lambda net, x: net.body(x) * float(np.mean(x.numpy())), "values of a tensor"),
    "rows that count": (lambda net, x: net.body(x)[x.mean((1, 2, 3)) > -9], "values of a tensor"),
    "places that count": (lambda net, x: net.body(x)[torch.where(x.mean((1, 2, 3)) > -9)], "shape that depends on the"),
    "cond": (lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (net.body(x),)), "torch.where"),
    "random": (lambda net, x: net.body(x) + torch.rand(6), "random"),
    "a GPU": (lambda net, x: net.body(x.to("cuda" if not torch.cuda.is_available() else "meta")), "x.device"),
    "half": (lambda net, x: net.body(x.half()), ".half()"),
    "a list of images": (lambda net, x: net.body(torch.stack(x)), "a list or a dict of images"),  # type: ignore[arg-type]
    "a dict": (lambda net, x: net.body(x["image"]), "a list or a dict of images"),  # type: ignore[call-overload]
    "rows by a plain number": (lambda net, x: net.head.bias.expand(int(x.shape[0]), 5), "x.shape[0]"),
    "less the batch's mean": (lambda net, x: net.head(net.body(x) - net.body(x).mean(0)), "other images of its batch"),
    "a softmax over images": (
        lambda net, x: net.head(net.body(x) * net.body(x).softmax(0)),
        "other images of its batch",
    ),
    "a loss": (lambda net, x: net.body(x).mean(), "along the first axis"),
    "images in a loop": (lambda net, x: torch.cat([net.body(part) for part in x.split(1)]), "mixes the images"),
    "one tensor for each image": (lambda net, x: list(net.body(x)), "mixes the images"),
    "the second image": (lambda net, x: net.body(x) + net.body(x)[1].mean(), "mixes the images"),
    "suppressed boxes": (
        lambda net, x: [y[torchvision.ops.nms(y[:, :4], y[:, 4], 0.5)] for y in net.body(x)[:, None].repeat(1, 4, 1)],
        "box decoding",
    ),
    "boxes": (lambda net, x: [{"boxes": net.body(i[None]), "scores": i.mean()} for i in x], "box decoding"),
    "nothing": (lambda net, x: None, "found NoneType"),
    "an array": (lambda net, x: net.body(x).numpy(), "found ndarray"),
    "not a number": (lambda net, x: (net.body(x) - 1e6).log(), "not finite"),
    "gradients": (lambda net, x: torch.autograd.grad(net.body(x.requires_grad_()).sum(), x)[0], "gradients"),
    "sparse": (lambda net, x: net.body(x).to_sparse().to_dense(), "sparse"),
    "leaving": (lambda net, x: exit(3), "Try it alone"),
    "a new layer": (lambda net, x: nn.Conv2d(3, 4, 1)(x), "random"),
}
"""And a word of the line that says so."""


def legal() -> nn.Module:
    """All legal constructs in one network, which returns a list."""
    return Odd(*LEGAL.values()).eval()
