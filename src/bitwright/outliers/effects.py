"""What the errors of all tensors add to the loss, from a few backward passes.

The loss is quadratic in the outputs' errors where they are small: ``E_v (v^T J e)^2`` for an error ``e`` of a tensor,
the Jacobian ``J`` of the outputs with respect to it, and random directions ``v`` whose covariance is the loss's Hessian
(half of it for KL). One backward pass gives ``v^T J`` at every tensor at once, so that its cost does not grow with the
number of tensors, and errors of any kind can be held against the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.products import fast_products
from bitwright.graph.readings import Reading
from bitwright.transfer import sent

See = Callable[[str, Tensor, Tensor], None]
"""Takes a node's name, its value [B, ...] and ``v^T J``, in the shape of the value."""


def see_gradients(
    graph: fx.GraphModule,
    batches: Iterable[Tensor],
    names: Collection[str],
    see: See,
    *,
    readings: Sequence[Reading],
    probes: int,
    seed: int,
) -> None:
    """Shows the values and the gradients of some nodes, for each batch and each of the directions.

    ``(gradient * error).flatten(1).sum(1).square()``, summed over images and divided by their number and that of the
    probes, estimates what the error adds to :func:`bitwright.sensitivity.one_at_a_time.distance_of_outputs`.

    Args:
        graph: in float.
        batches: images [B, C, H, W].
        names: of nodes that yield floating tensors.
        see: shown each of them.
        readings: of the outputs, one each.
        probes: directions for each batch.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        for _ in range(probes):
            seen = _Seen(graph, names, see)
            with torch.enable_grad(), fast_products(graph):
                pairs = zip(seen.run(batch), readings, strict=True)
                direction = sum(_along_random(o, how, generator) for o, how in pairs if o.requires_grad)
            if isinstance(direction, Tensor):
                direction.backward()  # type: ignore[no-untyped-call]
            seen.env.clear()  # its values' history holds the hooks, which hold it: nothing else would free them


def _along_random(output: Tensor, how: Reading, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient is a random direction of the output."""
    logs = how.log_probabilities(output)
    if logs is not None:  # KL to second order: half the Fisher information of the classes
        positions = max(1, logs[0, ..., 0, 0].numel())
        weights = (logs.detach().exp() / (2 * positions)).sqrt()
    else:
        logs = output
        each = output.detach().float().square().mean().clamp_min(1e-30) * max(1, output[0].numel())
        weights = each.rsqrt().expand_as(output)
    noise = sent(torch.randn(logs.shape, generator=generator), logs.device).to(logs.dtype)
    return (logs * noise * weights.to(logs.dtype)).sum().float()


class _Seen(fx.Interpreter):
    """Runs a graph and shows some of its values with their gradients, once these are known."""

    def __init__(self, graph: fx.GraphModule, names: Collection[str], see: See) -> None:
        super().__init__(graph)
        self.names, self.see = names, see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name not in self.names or not isinstance(result, Tensor):
            return result
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        value, name = result.detach(), n.name

        def show(gradient: Tensor) -> None:
            with torch.no_grad():
                self.see(name, value, gradient)

        result.register_hook(show)  # type: ignore[no-untyped-call]
        return result
