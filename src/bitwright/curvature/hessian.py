"""The curvature of a loss with respect to a network's weights: products, traces and spectra, never the matrix itself.

For N images with losses ``l_n`` of the outputs ``f_n``, weights ``w`` and Jacobians ``J_n = df_n/dw``::

    fisher   1/N sum_n J_n^T A_n J_n    A = diag(p) - p p^T,  p = softmax(f): cross-entropy, whatever the label is,
                                        and KL from the network itself, whose second-order term is 1/2 dw^T H dw nats
    squared  1/N sum_n J_n^T A_n J_n    A = 2/k I: mean squared error of k outputs, whatever the target is
    hessian  1/N sum_n d2 l_n / dw2     with labels, and nothing left out

The first two need no label and are never negative (methods, section 0.7). All are streamed: a pass over the images
holds one batch's graph, and serves the products of all layers, all blocks and the network together. That, buffers in
place of parameters, and forward derivatives that ATen lacks (``silu_backward``) are why this is not built on curvlinops
3.0.1, whose operators take one pass per layer (18 layers of the zoo's ViT: 5.4 s, here 1.9 s) and end at such an
operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitwright import together
from bitwright.curvature.label_free import NOT_FINITE, differentiable, draw
from bitwright.curvature.spectrum import Lanczos, Spectrum
from bitwright.errors import ModelError, UsageError
from bitwright.graph import ops, rewrite
from bitwright.graph.blocks import find_blocks
from bitwright.measure.classification import class_scores
from bitwright.progress import Progress, silent
from bitwright.quant.affine import to_blocks
from bitwright.transfer import CPU

if TYPE_CHECKING:
    from bitwright.given.images import Images

Name = TypeVar("Name", str, int)
Matrix = Literal["fisher", "squared", "hessian"]


def cross_entropy(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """Summed over the images, of the one output that holds class scores [B, K]."""
    return F.cross_entropy(class_scores(outputs, labels).float(), labels, reduction="sum")


@dataclass(frozen=True)
class Data:
    """Images that are gone through again and again, with their labels if there are any."""

    images: Images
    batch: int = 16
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def parts(self) -> int:
        """How many batches there are."""
        return math.ceil(len(self.images) / self.batch)

    def part(self, position: int) -> tuple[Tensor, Tensor | None]:
        """A batch [B, C, H, W] on the device, with its labels [B]."""
        some = range(position * self.batch, min((position + 1) * self.batch, len(self.images)))
        labels = None if self.images.labels is None else self.images.labels[some.start : some.stop].to(self.device)
        return self.images.batch(some, self.device or CPU), labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return map(self.part, range(self.parts))


# ------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Group:
    """Weights that are looked at as one.

    Example: ``Group("b.3.attn", "block", ("b.3.attn.qkv.weight", "b.3.attn.proj.weight"), 49_152)``
    """

    name: str
    kind: Literal["layer", "block", "network"]
    weights: tuple[str, ...]
    """Paths of stored tensors."""
    parameters: int
    """Elements of those together."""


def weights_of(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Paths of the stored weights of convolutions and linear layers, with the first operator that reads each."""
    found: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if ops.kind(node) == "linear":
            found.setdefault(str(node.args[1].target), node)
    return found


def weight_groups(graph: fx.GraphModule) -> list[Group]:
    """Every layer, every block and the network; a weight that several layers share belongs to the first."""
    readers = weights_of(graph)
    sizes = {path: rewrite.get_tensor(graph, path).numel() for path in readers}
    nodes = {n.name: str(n.args[1].target) for n in graph.graph.nodes if ops.kind(n) == "linear"}

    def group(name: str, kind: Literal["layer", "block", "network"], paths: Sequence[str]) -> Group:
        unique = tuple(dict.fromkeys(paths))
        return Group(name, kind, unique, sum(sizes[p] for p in unique))

    layers = [group(str(node.meta["layer"]), "layer", [path]) for path, node in readers.items()]
    blocks = [group(b.name, "block", [nodes[n] for n in b.nodes]) for b in find_blocks(graph)]
    return [*layers, *blocks, group("network", "network", list(readers))]


# ----------------------------------------------------------------------------------------------- products


class Curvature:
    """The matrix of all weights of convolutions and linear layers, of which only products and samples are computed.

    Args:
        graph: the float network, on the data's device; not changed.
        data: images, with labels for ``hessian``.
        matrix: which of the three; see the module. With ``fisher``, outputs that are no class scores count as with
            ``squared``.

    Raises:
        UsageError: ``hessian`` without labels.
    """

    def __init__(self, graph: fx.GraphModule, data: Data, matrix: Matrix = "fisher") -> None:
        if matrix == "hessian" and data.images.labels is None:
            raise UsageError("Expected labels for the Hessian of a loss, found none. Give labels=, or go without.")
        self.data, self.matrix = data, matrix
        self.graph = differentiable(graph, [])
        self.readers = weights_of(graph)
        self.weights: dict[str, Tensor] = {}
        for path in self.readers:
            leaf = rewrite.get_tensor(self.graph, path).detach().requires_grad_(True)
            rewrite.set_tensor(self.graph, path, leaf)
            self.weights[path] = leaf

    def products(self, blocks: Sequence[Sequence[str]], vectors: Sequence[Tensor]) -> list[Tensor]:
        """``H_bb v`` for each block b of weights and its vector, in one pass; processes take blocks in turn.

        Args:
            blocks: paths of weights; the matrix's part of these rows and columns is multiplied.
            vectors: for each block [n], the elements of its weights end to end.

        Returns:
            For each block, [n].
        """
        totals = {i: torch.zeros_like(v) for i, v in enumerate(vectors) if together.is_mine(i)}
        mine = [blocks[i] for i in totals], [vectors[i] for i in totals], list(totals.values())
        for images, labels in self.data if totals else ():
            self._add_products(images, labels, *mine)
        found = together.collected({i: (t / len(self.data)).cpu() for i, t in totals.items()}, len(vectors))
        return [f.to(v.device) for f, v in zip(found, vectors, strict=True)]

    def _add_products(
        self,
        images: Tensor,
        labels: Tensor | None,
        blocks: Sequence[Sequence[str]],
        vectors: Sequence[Tensor],
        totals: list[Tensor],
    ) -> None:
        local = self.at(images, labels)
        for block, vector, total in zip(blocks, vectors, totals, strict=True):
            parts = torch.split(vector, [self.weights[p].numel() for p in block])
            shaped = {p: v.view(self.weights[p].shape) for p, v in zip(block, parts, strict=True)}
            found = local.product(shaped)
            total += torch.cat([found[p].reshape(-1) for p in block])

    def at(self, images: Tensor, labels: Tensor | None) -> _Local:
        """The matrix of one batch [B, C, H, W] with labels [B], not divided by the number of its images."""
        with torch.enable_grad():
            outputs = [o for o in self.graph(images)[0] if o.requires_grad]
            if self.matrix != "hessian":
                return _GaussNewton(outputs, self.weights, self.matrix)
            assert labels is not None
            return _Hessian(cross_entropy(outputs, labels) if outputs else None, self.weights)

    def channels(self, path: str, elements: Tensor) -> Tensor:
        """Sums over the elements of each output channel of a weight, [C]."""
        node, shape = self.readers[path], tuple(elements.shape)
        block = (1, *shape[1:])
        if ops.base_name(node) in ops.CONV_TRANSPOSE:  # [I, O / groups, kh, kw]
            block = (shape[0] // rewrite.groups(node), 1, *shape[2:])
        return to_blocks(elements, block).sum(1)


class _Local:
    """The curvature at one batch."""

    def product(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        """The matrix of the vector's own weights times the vector."""
        raise NotImplementedError

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers whose mean is the diagonal, for the elements of every weight."""
        raise NotImplementedError


class _GaussNewton(_Local):
    def __init__(self, outputs: list[Tensor], weights: dict[str, Tensor], matrix: Matrix) -> None:
        self.outputs, self.weights = outputs, weights
        total = sum(o[0].numel() for o in outputs)
        self.losses = [
            _Softmax(o)
            if matrix == "fisher" and _are_scores(o)
            else _Squared(total if matrix == "squared" else None, o)
            for o in outputs
        ]

    @cached_property
    def _transposed(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """``u`` and ``J^T u``, linear in u, whose derivative is J (Pearlmutter 1994; no forward derivatives needed)."""
        directions = [torch.zeros_like(o, requires_grad=True) for o in self.outputs]
        return directions, _gradients(self.outputs, self.weights, directions, create_graph=True)

    def product(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        directions, transposed = self._transposed
        known = [n for n in vector if n in transposed]
        zeros = {n: torch.zeros_like(v) for n, v in vector.items()}
        if not known:
            return zeros
        inputs = dict(enumerate(directions))
        pushed = _gradients([transposed[n] for n in known], inputs, [vector[n] for n in known])
        bent = [
            loss.multiply(pushed[i]) if i in pushed else torch.zeros_like(o)
            for i, (loss, o) in enumerate(zip(self.losses, self.outputs, strict=True))
        ]
        return zeros | _gradients(self.outputs, {n: self.weights[n] for n in vector}, bent)

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``(J^T B u)^2`` with ``A = B B^T``: one backward pass for all weights, never negative."""
        probes = [draw(o.shape, "rademacher", generator).to(o) for o in self.outputs]
        factors = [loss.factor(u) for loss, u in zip(self.losses, probes, strict=True)]
        return {n: g.float().square() for n, g in _gradients(self.outputs, self.weights, factors).items()}


class _Softmax:
    """``A = (diag(p) - p p^T) / positions`` for scores [B, K, ...], and ``B = (diag(r) - p r^T) / sqrt(positions)``.

    With ``r = sqrt(p)``, ``B B^T = A`` since ``r^T r = 1``.
    """

    def __init__(self, scores: Tensor) -> None:
        self.p = scores.detach().softmax(1)
        self.positions = scores[0, 0].numel()

    def multiply(self, v: Tensor) -> Tensor:
        pv = self.p * v
        found: Tensor = (pv - self.p * pv.sum(1, keepdim=True)) / self.positions
        return found

    def factor(self, u: Tensor) -> Tensor:
        ru = self.p.sqrt() * u
        found: Tensor = (ru - self.p * ru.sum(1, keepdim=True)) / math.sqrt(self.positions)
        return found


class _Squared:
    """``A = 2/k I`` for k outputs of one image."""

    def __init__(self, count: int | None, output: Tensor) -> None:
        self.scale = 2.0 / (count or output[0].numel())

    def multiply(self, v: Tensor) -> Tensor:
        return v * self.scale

    def factor(self, u: Tensor) -> Tensor:
        return u * math.sqrt(self.scale)


def _are_scores(output: Tensor) -> bool:
    """As :func:`bitwright.measure.metrics.as_log_probabilities` reads them."""
    return output.dim() in {2, 4} and output.shape[1] > 1


class _Hessian(_Local):
    def __init__(self, value: Tensor | None, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        found = {} if value is None else _gradients([value], weights, [torch.ones_like(value)], create_graph=True)
        self.gradients = {n: g for n, g in found.items() if g.requires_grad}

    def product(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        zeros = {n: torch.zeros_like(v) for n, v in vector.items()}
        known = [n for n in vector if n in self.gradients]
        if not known:
            return zeros
        wanted = {n: self.weights[n] for n in vector}
        return zeros | _gradients([self.gradients[n] for n in known], wanted, [vector[n] for n in known])

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``v * H v``: the products between different weights have mean zero."""
        probes = {n: draw(w.shape, "rademacher", generator).to(w) for n, w in self.weights.items()}
        return {n: p * probes[n] for n, p in self.product(probes).items()}


def _gradients(
    outputs: list[Tensor], inputs: dict[Name, Tensor], directions: list[Tensor], *, create_graph: bool = False
) -> dict[Name, Tensor]:
    """Gradients by the inputs' names; those that nothing depends on are left out."""
    if not outputs:
        return {}
    try:
        found = torch.autograd.grad(
            outputs, list(inputs.values()), directions, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except (NotImplementedError, RuntimeError) as error:
        if "derivative" not in str(error) and "double backward" not in str(error):
            raise
        raise ModelError(
            f"The network has an operator without the derivatives that curvature needs ({str(error).splitlines()[0]})."
        ) from error
    return {n: g for n, g in zip(inputs, found, strict=True) if g is not None}


# ------------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True)
class Traces:
    """Traces of the matrix's parts.

    Attributes:
        trace: of each group, float64, [G].
        error: its standard error over the probes, for these images, [G]; infinite after a single probe.
        channels: the trace of every output channel, [C], by the path of the weight.
        probes: the most that a batch took.
    """

    trace: Tensor
    error: Tensor
    channels: dict[str, Tensor]
    probes: int


def traces(
    curvature: Curvature,
    wanted: Sequence[Group],
    *,
    probes: int = 32,
    least: int = 4,
    tolerance: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> Traces:
    """Hutchinson's estimate for all groups at once (methods, section 9), ended by its standard error.

    Args:
        curvature: of which matrix.
        wanted: G groups of weights.
        probes: the most for each batch: a backward pass each, with ``hessian`` two.
        least: and the fewest.
        tolerance: the relative standard error of every group's trace that ends the probing. A batch is done when its
            own error is small enough for the mean over all images to reach it.
        seed: of the probes.
        progress: called after each probe.

    Raises:
        ModelError: a gradient is not finite.
    """
    membership = torch.tensor([[float(p in g.weights) for p in curvature.weights] for g in wanted]).double()
    mean, variance = (torch.zeros(len(wanted), dtype=torch.float64) for _ in range(2))
    channels: dict[str, Tensor] = {}
    data = curvature.data

    def probed(position: int) -> _Probed:
        images, labels = data.part(position)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        allowed = tolerance * (len(data) / len(images)) ** 0.5
        part = _Probing(curvature, membership)
        local = curvature.at(images, labels)
        while part.count < probes and not (part.count >= max(least, 2) and part.relative_error() <= allowed):
            part.add(local.sample(generator))
            progress("Traces", position * data.batch, len(data), f"probe {part.count}")
        shares = {path: total / part.count / len(data) for path, total in part.channels.items()}
        return _Probed(part.mean, part.variance, shares, part.count)

    progress("Traces", 0, len(data))
    every = together.dealt(data.parts, probed)
    progress("Traces", len(data), len(data))
    for each in every:
        mean += each.mean
        variance += each.variance
        for path, share in each.channels.items():
            channels[path] = channels[path] + share if path in channels else share
    if not bool(torch.isfinite(mean).all()):
        worst = int((~torch.isfinite(mean)).nonzero()[0])
        raise ModelError(f"The curvature at {wanted[worst].name} is not finite for some image. {NOT_FINITE}")
    return Traces(mean / len(data), variance.sqrt() / len(data), channels, max(each.probes for each in every))


@dataclass(frozen=True)
class _Probed:
    """What the probes of one batch give: traces of groups [G] with their variance, and shares of channels by weight."""

    mean: Tensor
    variance: Tensor
    channels: dict[str, Tensor]
    probes: int


class _Probing:
    """Running sums over the probes of one batch."""

    def __init__(self, curvature: Curvature, membership: Tensor) -> None:
        self.curvature, self.membership = curvature, membership
        self.values: list[Tensor] = []
        self.channels: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        return len(self.values)

    def add(self, sample: dict[str, Tensor]) -> None:
        each = torch.zeros(self.membership.shape[1], dtype=torch.float64)
        for i, path in enumerate(self.curvature.weights):
            if path in sample:
                sums = self.curvature.channels(path, sample[path]).double().cpu()
                self.channels[path] = self.channels[path] + sums if path in self.channels else sums
                each[i] = sums.sum()
        self.values.append(self.membership @ each)

    @property
    def mean(self) -> Tensor:
        return torch.stack(self.values).mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the mean."""
        if self.count < 2:
            return torch.full_like(self.values[0], float("inf"))
        return torch.stack(self.values).var(0) / self.count

    def relative_error(self) -> float:
        error, mean = self.variance.sqrt(), self.mean.abs()
        return float(torch.where(error > 0, error / mean.clamp_min(1e-300), 0.0).max())


# ------------------------------------------------------------------------------------------------ spectra


def spectra(
    curvature: Curvature,
    wanted: Sequence[Group],
    *,
    count: int = 1,
    steps: int = 20,
    tolerance: float = 0.01,
    runs: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Spectrum]:
    """Top eigenvalues and density of the matrix's part of each group, all groups advancing with every pass.

    Args:
        curvature: of which matrix.
        wanted: groups of weights; those of the same weights are computed once.
        count: eigenvalues wanted.
        steps: the most passes over the images.
        tolerance: a group is done when its eigenvalues are known to that share of the largest; 0 takes all steps.
        runs: random starts for each group, over which the density is averaged.
        seed: of the starts.
        progress: called after each pass.

    Memory: ``runs * (steps + 1)`` vectors as long as all groups together.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = list(dict.fromkeys(g.weights for g in wanted))
    running: dict[tuple[str, ...], list[Lanczos]] = {}
    for block in blocks:
        some = curvature.weights[block[0]]
        size = torch.Size([sum(curvature.weights[p].numel() for p in block)])
        running[block] = [Lanczos(draw(size, "rademacher", generator).to(some), steps) for _ in range(runs)]
    progress("Eigenvalues", 0, steps)
    for step in range(steps):
        opened = [(b, r) for b in blocks for r in running[b] if not r.exhausted and not _done(r, count, tolerance)]
        if not opened:
            progress("Eigenvalues", steps, steps)
            break
        products = curvature.products([b for b, _ in opened], [r.vector for _, r in opened])
        for (_, run), product in zip(opened, products, strict=True):
            run.take(product)
        progress("Eigenvalues", step + 1, steps)
    return [Spectrum.of(running[g.weights], count) for g in wanted]


def _done(run: Lanczos, count: int, tolerance: float) -> bool:
    return tolerance > 0 and run.converged(count, tolerance)
