"""The label-free Hessian of EPTQ, for all layers and a whole batch of images from one backward pass per probe.

For an interest tensor ``z`` with Jacobian ``J = df/dz`` of the outputs ``f``, and random ``v`` with ``E[v v^T] = I``::

    E ||J^T v||^2 = Tr(J^T J) = ||J||_F^2          E (J^T v)_j^2 = (J^T J)_jj

``J^T v`` is the gradient of the scalar ``v^T f``. No label is needed: with the loss ``1/k ||f - y||^2`` the Hessian is
``2/k J^T J`` whatever ``y`` is, and it bounds that of cross-entropy (methods, section 0.7; arXiv:2309.11531).

Activations of different images do not mix, so that one pass gives every image its own scores. Gradients of weights
sum over the images, but with independent probes the mixed terms of their squares vanish in expectation, so that
weights need no loop over images either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from bitwright import together
from bitwright.errors import ModelError
from bitwright.graph import ops, rewrite
from bitwright.graph.points import Point, expose
from bitwright.memory import saved_bytes
from bitwright.run import checkpoint
from bitwright.transfer import fetched, sent

Distribution = Literal["rademacher", "gaussian"]
NOT_FINITE = (
    "Roots, divisions and logarithms have no slope at 0: leave out images that bring one there (of one colour, say), "
    "or take what needs no gradients, as the recipe optq."
)
"""What is said of gradients that are not finite."""


@dataclass
class HessianScores:
    """What the label-free Hessian says of each interest tensor.

    Shapes: N images, L points.
    """

    layers: list[str]
    """Names, [L]."""
    outputs: int
    """Length k of one image's output."""
    trace: Tensor
    """``2/k ||J||_F^2``, [N, L]."""
    attention: Tensor
    """Largest over channels of the mean over positions of ``diag(J^T J)``: EPTQ v2's sample-layer attention, [N, L]."""
    error: Tensor
    """Relative standard error of each layer's mean trace, from the spread of the probes, [L]."""
    probes: int
    """The most that a batch took."""
    elements: dict[str, Tensor] = field(default_factory=dict)
    """``diag(J^T J)`` for the elements of each weight, a mean over images; by the path of the stored tensor."""

    @property
    def layer_trace(self) -> Tensor:
        """Mean over images, [L]."""
        return self.trace.mean(0)

    def log_weights(self) -> Tensor:
        """EPTQ v1's weights of the layers: ``log10`` of the mean trace above the least one, [L].

        A layer whose trace is zero takes the second smallest value; where all are equal, every weight is 1.
        """
        trace = self.layer_trace.double()
        positive = trace[trace > 0]
        if len(positive) == 0:
            return torch.ones(len(trace))
        logs = torch.where(trace > 0, trace, positive.min()).log10()
        weights = (logs - logs.min()).float()
        return weights if bool((weights > 0).any()) else torch.ones_like(weights)

    def log_attention(self) -> Tensor:
        """The log weights of the layers, spread over the images in proportion to their attention scores, [N, L].

        The mean over images is :meth:`log_weights`.
        """
        mean = self.attention.mean(0)
        share = torch.where(mean > 0, self.attention / mean.clamp_min(1e-30), 1.0)
        return share * self.log_weights()


def label_free_scores(
    graph: fx.GraphModule,
    batches: Iterable[Tensor | None],
    points: list[Point],
    *,
    probes: int = 16,
    least: int = 4,
    tolerance: float = 0.05,
    distribution: Distribution = "rademacher",
    elements: bool = False,
    seed: int = 0,
    total: int | None = None,
) -> HessianScores:
    """Scores of every point for every image.

    Args:
        graph: the float network.
        batches: images [B, C, H, W] on the graph's device; None in the place of those that another process takes.
        points: where.
        probes: the most backward passes per batch.
        least: the fewest backward passes per batch.
        tolerance: the relative standard error of the layers' mean traces that ends the probing. A batch is done when
            its own error is small enough for the mean over all images to reach it.
        distribution: of the probes; Rademacher has the smaller variance.
        elements: score the elements of weights as well.
        seed: of the probes.
        total: number of images to come, which the criterion needs to spread the error; one batch's own if not known.

    Raises:
        ModelError: a gradient is not finite. (Where no output depends on a point, as far as derivatives can tell, its
            scores are zero.)
    """
    probe = _Probe(graph, points, elements)
    parts: dict[int, _Batch] = {}
    count = 0
    for position, images in enumerate(batches):
        count += 1
        if images is None:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        share = 1.0 if total is None else max(1.0, total / len(images))
        part = _Batch(points, len(images))
        for gradients, weights in probe.run(images, probes, distribution, generator):
            part.add(gradients, weights)
            del gradients, weights  # before those of the next probe come to lie beside them
            if part.probes >= least and float(part.relative_error().max()) <= tolerance * share**0.5:
                break
        part.settle()
        part.outputs = probe.outputs
        parts[position] = part
    if together.processes() > 1:  # also where one process has taken every batch: the others wait for it
        return _join(together.collected({k: part.on_cpu() for k, part in parts.items()}, count), points)
    return _join(list(parts.values()), points)


def images_at_once(graph: fx.GraphModule, pair: Tensor, points: list[Point], budget: int) -> int:
    """How many images per batch :func:`label_free_scores` can take within ``budget`` bytes of memory, at least one.

    Args:
        graph: the float network.
        pair: two images [2, C, H, W]; what the second adds is counted.
        points: where; each image's gradients at all of them are held at the same time.
        budget: bytes.
    """
    probe = _Probe(graph, points, elements=False)

    def held(images: Tensor) -> int:
        found: list[Tensor] = []
        saved = saved_bytes(lambda: found.extend(probe.graph(images.detach().clone().requires_grad_(True))[1]))
        return saved + sum(v.nbytes for v in found)

    return max(1, budget // max(1, held(pair) - held(pair[:1])))


class _Probe:
    """Runs the network with its interest tensors as variables."""

    def __init__(self, graph: fx.GraphModule, points: list[Point], elements: bool) -> None:
        self.points = points
        self.graph = differentiable(graph, points)
        self.stored = _linear_weights(graph) if elements else []
        self.variables = {*self.stored, *_weights_of_constants(graph, points)}
        self.outputs = 0

    def run(
        self, images: Tensor, probes: int, distribution: Distribution, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor | None], dict[str, Tensor]]]:
        """Gradients of ``v^T f`` with respect to the points and the weights, one pair per probe."""
        variables = {name: rewrite.get_tensor(self.graph, name) for name in self.variables}
        weights = {name: variables[name] for name in self.stored}
        with torch.enable_grad():
            for tensor in variables.values():
                tensor.requires_grad_(True)
            try:
                outputs, values = self.graph(images.detach().clone().requires_grad_(True))
                flat = [o.reshape(len(images), -1).float() for o in outputs if o.requires_grad]
                self.outputs = sum(o.shape[1] for o in flat)
                wanted = [v for v in values if v.requires_grad] + list(weights.values())
                for step in range(probes if flat and wanted else 0):
                    directions = [sent(draw(o.shape, distribution, generator), o.device) for o in flat]
                    more = step + 1 < probes
                    yield _by_kind(  # in no variable, which would hold them until those of the next probe are there
                        torch.autograd.grad(flat, wanted, directions, retain_graph=more, allow_unused=True),
                        values,
                        weights,
                    )
            finally:
                for tensor in variables.values():
                    tensor.requires_grad_(False)


def _by_kind(
    found: Sequence[Tensor | None], values: list[Tensor], weights: Iterable[str]
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Gradients at the points, and of the weights by name."""
    each = iter(found)
    gradients = [next(each) if v.requires_grad else None for v in values]
    return gradients, {name: g for name, g in zip(weights, each, strict=True) if g is not None}


class _Batch:
    """Running sums over the probes of one batch."""

    def __init__(self, points: list[Point], count: int) -> None:
        self.points, self.count, self.probes, self.outputs = points, count, 0, 0
        self.sum = torch.zeros(count, len(points), dtype=torch.float64)
        self.squares = torch.zeros(len(points), dtype=torch.float64)
        self.totals = torch.zeros(len(points), dtype=torch.float64)
        self.channels: list[Tensor | None] = [None] * len(points)
        self.elements: dict[str, Tensor] = {}
        self._noted: list[tuple[list[int], Tensor]] = []

    def on_cpu(self) -> _Batch:
        """As other processes can take it."""
        there = iter(fetched([c for c in self.channels if c is not None]))
        self.channels = [None if c is None else next(there) for c in self.channels]
        self.elements = dict(zip(self.elements, fetched(list(self.elements.values())), strict=True))
        return self

    def add(self, gradients: list[Tensor | None], weights: dict[str, Tensor]) -> None:
        """Takes the gradients of one probe; :meth:`settle` adds them."""
        self.probes += 1
        found: dict[int, Tensor] = {}
        for i, (point, gradient) in enumerate(zip(self.points, gradients, strict=True)):
            if gradient is None:
                continue
            squares = gradient.float().square()
            if point.constant:  # one gradient, of all images together: each is given its share
                squares = squares / self.count
            means = point.channel_means(squares, self.count)
            found[i] = means.double().sum(1) * point.positions(gradient, self.count)
            before = self.channels[i]
            self.channels[i] = means if before is None else before + means
        if found:
            self._noted.append((list(found), torch.stack(list(found.values()))))
        for name, gradient in weights.items():
            squares = gradient.float().square()
            self.elements[name] = squares if name not in self.elements else self.elements[name].add_(squares)

    def settle(self) -> None:
        """Adds what the probes have brought, with one wait for a GPU."""
        for (found, _), rows in zip(self._noted, fetched([rows for _, rows in self._noted]), strict=True):
            for i, norms in zip(found, rows, strict=True):
                self.sum[:, i] += norms
                self.totals[i] += norms.mean()
                self.squares[i] += norms.mean() ** 2
        self._noted = []

    def attention(self) -> Tensor:
        """Largest over the channels of each point, [B, L], where the gradients were."""
        given = next((c for c in self.channels if c is not None), self.sum)
        none = torch.zeros(self.count, device=given.device)
        return torch.stack([none if c is None else (c / self.probes).amax(1).float() for c in self.channels], 1)

    def relative_error(self) -> Tensor:
        """Of each point's mean over the batch, [L]; zero where there is no gradient at all."""
        self.settle()
        if self.probes < 2:
            return torch.where(self.totals > 0, float("inf"), 0.0)
        mean = self.totals / self.probes
        variance = (self.squares / self.probes - mean**2).clamp_min(0) / (self.probes - 1)
        return torch.where(mean > 0, variance.sqrt() / mean.clamp_min(1e-300), 0.0)


def _join(parts: list[_Batch], points: list[Point]) -> HessianScores:
    count, outputs = sum(p.count for p in parts), max((p.outputs for p in parts), default=0)
    factor = 2 / max(outputs, 1)
    trace = torch.cat([p.sum / max(p.probes, 1) for p in parts]) * factor
    attention = torch.cat(fetched([part.attention() for part in parts]))
    variance = sum((p.relative_error() * p.totals / max(p.probes, 1) * p.count) ** 2 for p in parts)
    mean = trace.sum(0) / factor
    error = torch.where(mean > 0, torch.as_tensor(variance).sqrt() / mean.clamp_min(1e-300), 0.0)
    elements: dict[str, Tensor] = {}
    for part in parts:
        for name, squares in part.elements.items():
            share = squares / (part.probes * count)
            elements[name] = share if name not in elements else elements[name] + share
    if not bool(torch.isfinite(trace).all()):
        worst = int((~torch.isfinite(trace)).any(0).nonzero()[0])
        raise ModelError(
            f"The gradient at {points[worst].layer} is not finite for some calibration image. {NOT_FINITE}"
        )
    return HessianScores(
        [p.layer for p in points],
        outputs,
        trace.float(),
        attention,
        error.float(),
        max((p.probes for p in parts), default=0),
        elements,
    )


def draw(shape: torch.Size, distribution: Distribution, generator: torch.Generator) -> Tensor:
    """A probe of this shape: random numbers with mean 0 and variance 1, float32, on the CPU."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()


def _linear_weights(graph: fx.GraphModule) -> list[str]:
    found = [str(n.args[1].target) for n in graph.graph.nodes if ops.kind(n) == "linear"]
    return list(dict.fromkeys(found))


def _weights_of_constants(graph: fx.GraphModule, points: list[Point]) -> list[str]:
    """Stored weights of the points that no image reaches: as variables they let gradients reach those points."""
    nodes = {n.name: n for n in graph.graph.nodes}
    return [str(nodes[p.node].args[1].target) for p in points if p.constant]


UNDIFFERENTIABLE = frozenset({"argmax", "argmin", "round", "sign", "floor", "ceil", "eq", "gt", "ge", "lt", "le", "to"})


def differentiable(graph: fx.GraphModule, points: list[Point]) -> fx.GraphModule:
    """The network with its interest tensors exposed, and outputs that have a useful derivative, each once.

    A softmax, and an operator without a derivative (argmax), is replaced by what it is applied to: the logits.
    """
    exposed = expose(graph, [p.node for p in points])
    output = next(n for n in exposed.graph.nodes if n.op == "output")
    outputs, values = output.args[0]
    output.args = ((list(dict.fromkeys(_logits(o) for o in outputs)), values),)
    exposed.recompile()
    return exposed


def _logits(output: fx.Node) -> fx.Node:
    """The output itself, or what stands before the last operator that hides the logits, behind moves of data too."""
    found = node = output
    while node.op == "call_function":
        hides = _hides(node) or (node is found and not isinstance(ops.value(node), Tensor))
        sources = [n for n in node.all_input_nodes if n.op != "get_attr" and _carries_tensors(n)]
        if not sources or not (hides or ops.kind(node) == "move"):
            break
        node = next((n for n in sources if ops.is_float_tensor(n)), sources[0])
        if hides:
            found = node
    return found


def _hides(node: fx.Node) -> bool:
    return ops.kind(node) == "softmax" or ops.base_name(node) in UNDIFFERENTIABLE or not ops.is_float_tensor(node)


def _carries_tensors(node: fx.Node) -> bool:
    value = ops.value(node)
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))


# ---------------------------------------------------------------------------------------------- the cache


def cached_scores(folder: Path | None, key: str, compute: Callable[[], HessianScores]) -> HessianScores:
    """Scores kept beside the run under a key of everything they depend on; computed if they are not there.

    Args:
        folder: None keeps nothing.
        key: what they depend on: network, images, settings.
        compute: called if there are none.
    """
    if folder is None:
        return compute()
    path = folder / f"scores-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    kept = checkpoint.read_good(path, "The scores are computed again.")
    if kept is not None:
        return _scores(*kept)
    found = compute()
    _save(found, path)
    return found


def _save(scores: HessianScores, path: Path) -> None:
    tensors = {"trace": scores.trace, "attention": scores.attention, "error": scores.error}
    tensors |= {f"elements/{name}": t for name, t in scores.elements.items()}
    header = {
        "layers": json.dumps(scores.layers),
        "outputs": str(scores.outputs),
        "probes": str(scores.probes),
    }
    checkpoint.write(path, tensors, header)


def _scores(header: dict[str, str], tensors: dict[str, Tensor]) -> HessianScores:
    return HessianScores(
        json.loads(header["layers"]),
        int(header["outputs"]),
        tensors["trace"],
        tensors["attention"],
        tensors["error"],
        int(header["probes"]),
        {n.removeprefix("elements/"): t for n, t in tensors.items() if n.startswith("elements/")},
    )
