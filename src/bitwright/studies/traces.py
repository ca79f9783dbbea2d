"""Traces of a loss's true Hessian with respect to activations, for all layers from one second derivative per probe.

For tensors ``z_1 .. z_L`` with gradients ``g_l = dL/dz_l`` and independent probes ``v_l`` with ``E[v_l v_l^T] = I``,
the gradient of ``sum_m g_m . v_m`` with respect to ``z_l`` is ``sum_m H_lm v_m``, and::

    E v_l . (sum_m H_lm v_m) = E v_l^T H_ll v_l = Tr H_ll

since the cross terms have mean zero (Hutchinson 1989; block form as in arXiv:1911.03852). No term of the Hessian is
dropped, unlike in :mod:`bitwright.curvature.label_free`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bitwright.curvature.label_free import differentiable, draw
from bitwright.errors import ModelError
from bitwright.given.images import Images
from bitwright.graph.points import Point
from bitwright.progress import Progress, silent
from bitwright.transfer import CPU

BATCH = 16


@dataclass(frozen=True)
class Loss:
    """A loss of class scores.

    Attributes:
        name: as shown.
        value: ``value(scores [B, K], targets [B, ...])``, summed over the images.
        targets: of all images, [N, ...].
        bound: c with ``0 <= d2 value / d scores2 <= c I``, so that without its dropped term ``Tr H <= c Tr(J^T J)``.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor
    bound: float


@dataclass(frozen=True)
class ActivationTraces:
    """Mean over images of the Hessian's trace at each point, [L], and its standard error over the probes, [L]."""

    mean: Tensor
    error: Tensor


def hessian_traces(
    graph: fx.GraphModule,
    images: Images,
    points: list[Point],
    loss: Loss,
    *,
    probes: int = 32,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> ActivationTraces:
    """``Tr d2L/dz2`` for the tensors at all points, averaged over the images.

    Args:
        graph: the float network, on the device, with one output of class scores (or their softmax).
        images: N of them.
        points: L of them.
        loss: whose second derivative is wanted.
        probes: Rademacher vectors for each batch, at least 2.
        seed: of the probes.
        device: of the graph.
        progress: called after each batch.

    Raises:
        ModelError: the network has no single output of class scores, or an operator without a second derivative.
    """
    exposed = differentiable(graph, points)
    mean, variance = (torch.zeros(len(points), dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(images), BATCH):
        where = range(start, min(start + BATCH, len(images)))
        batch = images.batch(where, device or CPU)
        found = _probe(exposed, batch, loss, loss.targets[start : where.stop].to(device), probes, generator)
        mean += found.mean(0)
        variance += found.var(0) / probes
        progress("Second derivatives", where.stop, len(images))
    return ActivationTraces((mean / len(images)).float(), (variance.sqrt() / len(images)).float())


def _probe(
    exposed: fx.GraphModule, batch: Tensor, loss: Loss, targets: Tensor, probes: int, generator: torch.Generator
) -> Tensor:
    """``v_l^T H v`` summed over the batch, for each probe and point, [P, L]."""
    with torch.enable_grad():
        outputs, values = exposed(batch.clone().requires_grad_(True))
        value = loss.value(scores_of(outputs), targets)
        known = [i for i, v in enumerate(values) if v.requires_grad]
        wanted = [values[i] for i in known]
        found = torch.zeros(probes, len(values), dtype=torch.float64)
        gradients = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
        pairs = [(i, z, g) for i, z, g in zip(known, wanted, gradients, strict=True) if g is not None]
        for probe in range(probes):
            directions = [draw(z.shape, "rademacher", generator).to(z) for _, z, _ in pairs]
            total = torch.stack([(g * v).sum() for (_, _, g), v in zip(pairs, directions, strict=True)]).sum()
            products = _second(total, [z for _, z, _ in pairs], keep=probe + 1 < probes)
            for (i, _, _), v, product in zip(pairs, directions, products, strict=True):
                if product is not None:
                    found[probe, i] = float((v * product).sum(dtype=torch.float64))
    return found


def _second(total: Tensor, wanted: list[Tensor], *, keep: bool) -> tuple[Tensor | None, ...]:
    if not total.requires_grad:
        return (None,) * len(wanted)
    try:
        return torch.autograd.grad(total, wanted, retain_graph=keep, allow_unused=True)
    except (NotImplementedError, RuntimeError) as error:
        if "derivative" not in str(error):
            raise
        raise ModelError(
            f"The network has an operator without a second derivative ({str(error).splitlines()[0]})."
        ) from error


def scores_of(outputs: list[Tensor]) -> Tensor:
    """The one output of class scores, [B, K].

    Raises:
        ModelError: there is another output, or it has another shape.
    """
    if len(outputs) != 1 or outputs[0].dim() != 2:
        shapes = ", ".join("x".join(map(str, o.shape[1:])) for o in outputs)
        raise ModelError(
            f"Expected one output of class scores for the losses of this study, found outputs of {shapes}. "
            "Name the one to keep with output=."
        )
    return outputs[0]
