"""Where Evol-Q begins: the grids of FQ-ViT (arXiv:2111.13824), as the code of Evol-Q (arXiv:2308.10814) sets them.

Weights of every output channel span minimum to maximum, unsigned with a zero point; what normalisations read has
power-of-two factors; and a correction gives every channel of a rounded weight its mean and deviation back at each
pass, which no file can hold. The softmax is of even steps, as Evol-Q's script has it, or FQ-ViT's own on integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx, nn

from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import updating, watch
from bitwright.progress import Progress
from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.ranges import activation_range
from bitwright.quant.scheme import Scheme
from bitwright.quant.statistics import Statistics
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters
from bitwright.studies.subject import Subject

SoftmaxGrid = Literal["even", "log-int"]
SOFTMAX_GRIDS: tuple[SoftmaxGrid, ...] = get_args(SoftmaxGrid)
LOG_BITS = 4
"""Of a softmax's logarithms, whatever the other activations have: FQ-ViT's."""
POLYNOMIAL = 0.96963238 / 0.35815147, 1 / 0.35815147
"""``b`` and ``c`` of ``exp(x) = a (x (x + b) + c)`` for x in (-ln 2, 0] (I-BERT, arXiv:2101.01321); ``a`` cancels."""
HALVINGS = 30
"""By which the exponential may fall below its largest value."""
CALIBRATE = Calibrate(weights="minmax", activations="mse", norm_inputs="ptf")


@dataclass(frozen=True)
class Octaves(Grid):
    """Powers of two from 1 down: code k stands for ``2^-k``, and what rounds beyond the last one is 0 (FQ-ViT, eq. 9).

    Example:
        >>> Octaves(2).nearest(torch.tensor([1.0, 0.3, 0.2, 0.01]), torch.ones(()))
        tensor([1.0000, 0.2500, 0.2500, 0.0000])
    """

    kind: ClassVar[str] = "log-int"
    even: ClassVar[bool] = False

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
        """``2^-k`` with ``k = floor(log2 y)``, one more from 1.5 times that power on, of ``y = round(1 / x)``."""
        inverse = (scale / x.clamp_min(torch.finfo(x.dtype).tiny)).round().clamp_min(1)
        floor = inverse.log2().floor()
        code = floor + (inverse >= 1.5 * floor.exp2())
        return torch.where(code > self.qmax, 0.0, (-code).exp2() * scale)


def softmax_of_codes(x: Tensor, dim: int, step: float, zero_point: float, bits: int) -> Tensor:
    """Softmax along an axis of scores, which a grid with this step and zero point rounds first."""
    return Grid(bits).nearest(x, torch.tensor(step), torch.tensor(zero_point)).softmax(dim)


def integer_softmax(x: Tensor, dim: int, step: float, zero_point: float, bits: int) -> Tensor:
    """The same with additions, multiplications and shifts of their codes alone (FQ-ViT, I-BERT).

    Example:
        >>> [round(p, 2) for p in integer_softmax(torch.tensor([0.0, 1.0]), 0, 0.01, 0.0, 8).tolist()]
        [0.27, 0.73]
    """
    b, c = POLYNOMIAL
    codes = Grid(bits).codes(x, torch.tensor(step), torch.tensor(zero_point)).double()
    codes = codes - codes.amax(dim, keepdim=True)
    half = math.floor(-math.log(2) / step)
    codes = codes.clamp_min(HALVINGS * half)
    halvings = (codes / half).floor()
    rest = codes - half * halvings
    curve = rest * (rest + math.floor(b / step)) + math.floor(c / step**2)
    powers = (curve * (HALVINGS - halvings).exp2()).floor().clamp_min(0)
    return (powers / powers.sum(dim, keepdim=True)).to(x.dtype)


def fq_vit(
    subject: Subject, scheme: Scheme, softmax: SoftmaxGrid, images: Images, seed: int, progress: Progress
) -> Student:
    """The network on these grids, calibrated on images."""
    student = insert_quantizers(subject.teacher, scheme)
    student.to(subject.device)
    run = Run(seed=seed, device=subject.device, progress=progress)
    student = CALIBRATE.run(student, subject.teacher, images, run)
    for stored, quantizer in parameters(student.graph, "weight"):
        _span(quantizer, rewrite.get_tensor(student.graph, stored))
        quantizer.register_forward_hook(_corrected)
    if scheme.activations is not None:
        _on_grids(student, subject, scheme.activations, softmax, images, run)
    return student


def softmaxes(graph: fx.GraphModule) -> list[Any]:
    """Where a network has one."""
    return [n for n in graph.graph.nodes if ops.base_name(n) in {"softmax", "_softmax"}]


def _on_grids(student: Student, subject: Subject, bits: int, softmax: SoftmaxGrid, images: Images, run: Run) -> None:
    """Puts the scores before every softmax on a grid, which bitwright leaves in float, and the result on its own."""
    nodes = softmaxes(student.graph)
    seen = {n.args[0].name: Statistics(n.name) for n in nodes}
    for batch in run.batches(images, "Scores"):
        watch(subject.teacher.graph, batch, {name: updating(each) for name, each in seen.items()})
    for node in nodes:
        found = activation_range(seen[node.args[0].name], Grid(bits))
        step, zero = (float(each) for each in Grid(bits).spanning(*map(torch.tensor, found)))
        node.target = softmax_of_codes if softmax == "even" else integer_softmax
        node.args, node.kwargs = (*node.args[:2], step, zero, bits), {}
        for reader in node.users if softmax == "log-int" else ():
            if reader.op == "call_module":
                quantizer = student.quantizer(str(reader.target))
                quantizer.grid = Octaves(LOG_BITS)
                quantizer.set_range(torch.ones(1), torch.zeros(1))
    student.graph.recompile()


def _span(quantizer: Quantizer, weight: Tensor) -> None:
    """Unsigned codes from the smallest to the largest element of each channel."""
    assert quantizer.block is not None
    rows = affine.to_blocks(weight, quantizer.block)
    quantizer.grid = Grid(quantizer.grid.bits)
    quantizer.set_range(*quantizer.grid.spanning(rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)))


def _corrected(quantizer: nn.Module, given: tuple[Tensor, ...], rounded: Tensor) -> Tensor:
    """``(w_q - mean(w_q)) std(w) / (std(w_q) + 1e-8) + mean(w)`` for each channel: "bias correction" in the code."""
    assert isinstance(quantizer, Quantizer)
    assert quantizer.block is not None
    wanted, found = (affine.to_blocks(x, quantizer.block) for x in (given[0], rounded))
    ratio = wanted.std(1, correction=0) / (found.std(1, correction=0) + 1e-8)
    middle, mean, stretch = (quantizer.spread(each) for each in (found.mean(1), wanted.mean(1), ratio))
    return (rounded - middle) * stretch + mean
