"""Scales of weights optimised by gradients, which pass straight through the rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.graph.student import Student
from bitwright.progress import Progress, silent
from bitwright.quant.quantizer import Quantizer
from bitwright.stages.candidates import Batches, Fitness, Scales

BACKWARD = 2.0
"""What a backward pass costs, in forward passes."""
LOOKS = 8
"""How often all images are looked at along the way; each is an evaluation, and the best is the result."""
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": lambda p, rate: torch.optim.AdamW(p, rate, weight_decay=0.01),
}


class Straight(nn.Module):
    """A quantizer with gradients: to its input inside the range, to the logarithm of its scale by LSQ's rule.

    With ``r = x / s``, ``d Q / d s`` is ``round(r) - r`` inside and the end of the range outside (arXiv:1902.08153,
    equation 3).
    While ``shift`` is zero, the forward pass is the quantizer's bit for bit.

    Args:
        quantizer: calibrated; it is not changed.
        learn: whether the scale is a variable; of weights only.
    """

    scale: Tensor

    def __init__(self, quantizer: Quantizer, *, learn: bool) -> None:
        super().__init__()
        self._quantizer = (quantizer,)
        self.register_buffer("scale", quantizer.scale)
        self.shift = nn.Parameter(torch.zeros_like(quantizer.scale), requires_grad=learn)

    def scales(self) -> Tensor:
        """As they are now, [number of blocks]."""
        return self.scale * self.shift.exp()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its shape."""
        quantizer = self._quantizer[0]
        step, zero = quantizer.expanded()
        if self.shift.requires_grad:
            step = quantizer.spread(self.scales())
        ratio = x / step
        rounded = ratio.round().detach() + (ratio - ratio.detach())
        low, high = quantizer.grid.levels
        return rounded.clamp(low - zero, high - zero) * step


def stand_ins(student: Student, learned: Sequence[str]) -> dict[str, Straight]:
    """Quantizers by path: those whose scales are learned, and those of activations, which gradients pass through."""
    known = {k: m for k, m in student.graph.named_children() if isinstance(m, Quantizer) and m.calibrated}
    return {k: Straight(m, learn=k in learned) for k, m in known.items() if k in learned or m.role != "weight"}


@contextmanager
def placed(student: Student, modules: Mapping[str, Straight]) -> Iterator[None]:
    """Puts them in the quantizers' places for a while."""
    kept = {key: student.quantizer(key) for key in modules}
    try:
        for key, module in modules.items():
            student.graph.add_module(key, module)
        yield
    finally:
        for key, quantizer in kept.items():
            student.graph.add_module(key, quantizer)


@dataclass
class Descent:
    """What an optimiser found.

    Attributes:
        best: scales [D], the best of those that all images were looked at with.
        fitness: of those.
        curve: (evaluations, fitness on all images).
        evaluations: spent, in forward passes over all images.
        steps: taken.
    """

    best: Tensor
    fitness: float
    curve: list[tuple[float, float]]
    evaluations: float = 0.0
    steps: int = 0


def price(batches: Batches) -> float:
    """Cost of one step, which takes one of the batches forwards and backwards, in forward passes over all batches."""
    return (1 + BACKWARD) / len(batches.parts)


def descend(
    student: Student,
    scales: Scales,
    batches: Batches,
    fitness: Fitness,
    method: str,
    rate: float,
    budget: int,
    seed: int,
    progress: Progress = silent,
) -> Descent:
    """Optimises the logarithms of scales, batch after batch, for as many evaluations as the budget allows.

    Args:
        student: left as it was.
        scales: of weights; what is optimised.
        batches: of calibration images.
        fitness: its mean is descended.
        method: one of :data:`OPTIMIZERS`.
        rate: root mean square of the relative change that the first step makes (of Adam, about every step until the
            rate falls); along the run it falls to 0 as half a cosine.
        budget: evaluations, the looks at all images included.
        seed: of the order of batches.
        progress: called after every step.
    """
    start, least = scales.get(), scales.least()
    before = float(batches.losses(student.flat, fitness).double().mean())
    found = Descent(start, before, [(0.0, before)])
    looks = max(1, min(LOOKS, budget // 4))
    steps = max(0, int((budget - looks) / price(batches) + 1e-9))
    modules = stand_ins(student, scales.keys)
    parameters = [modules[key].shift for key in scales.keys]
    walk = _walk(student, batches, fitness, parameters, method, rate, steps, seed)
    for look in range(looks):
        with placed(student, modules):
            while found.steps * looks < steps * (look + 1):
                next(walk)
                found.steps += 1
                progress(method, found.steps, steps)
        scales.set(torch.maximum(torch.cat([modules[k].scales().detach() for k in scales.keys]), least))
        fitness_now = float(batches.losses(student.flat, fitness).double().mean())
        found.evaluations = found.steps * price(batches) + look + 1
        found.curve.append((found.evaluations, fitness_now))
        if fitness_now < found.fitness:
            found.best, found.fitness = scales.get(), fitness_now
    scales.set(start)
    return found


def _walk(
    student: Student,
    batches: Batches,
    fitness: Fitness,
    parameters: list[nn.Parameter],
    method: str,
    rate: float,
    steps: int,
    seed: int,
) -> Iterator[None]:
    """One step each time."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    optimizer: torch.optim.Optimizer | None = None
    for _ in range(steps):
        order = order or torch.randperm(len(batches.parts), generator=generator).tolist()
        part = order.pop()
        outputs = student.flat(batches.load(batches.parts[part]))
        gradients = torch.autograd.grad(fitness(outputs, batches.targets[part]).mean(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if optimizer is None:
            size = float(torch.cat(gradients).square().mean().sqrt())
            optimizer = OPTIMIZERS[method](parameters, rate / max(size, 1e-30) if method == "SGD" else rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        optimizer.step()
        schedule.step()
        yield
