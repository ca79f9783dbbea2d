"""The optimizers of an optimisation: one for each kind of variable, with its rate and its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from bitwright.stages.learner import Learner
from bitwright.stages.schedules import Learn


class Rates(Protocol):
    """How each kind of variable is learned; None for one that is not."""

    @property
    def codes(self) -> Learn | None:
        """Of the real numbers that are rounded to codes."""

    @property
    def weight_step(self) -> Learn | None:
        """Of the steps of weights."""

    @property
    def bias(self) -> Learn | None:
        """Of biases."""

    @property
    def activation_step(self) -> Learn | None:
        """Of the steps of activations."""


class SignDescent(torch.optim.Optimizer):
    """Every number goes by the rate against the sign of its gradient (AutoRound, arXiv:2309.05516, algorithm 1).

    Args:
        params: as of any optimizer.
        lr: the rate.
    """

    def __init__(self, params: ParamsT, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, from the gradients there are."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved:
                signs = torch._foreach_sign([p.grad for p in moved])
                torch._foreach_add_(moved, signs, alpha=-group["lr"])


@dataclass
class OptimizedPart:
    """One kind of variable with its optimizer; rates relative to a parameter's size where that is its scale.

    On a GPU all parameters are one group, whose rate is 1, and parts whose optimizers are alike share one: what a step
    changes is multiplied afterwards, by a rate that may be a tensor there. Rates of their own would be groups, and each
    group dozens of kernels.
    """

    optimizer: torch.optim.Optimizer
    learn: Learn
    parameters: list[nn.Parameter]
    sizes: list[float]
    rate: float = 0.0

    @classmethod
    def of(cls, sized: Iterable[tuple[nn.Parameter, float]], learn: Learn | None) -> OptimizedPart | None:
        """An optimizer for those of the parameters that are learned; None where there are none.

        Args:
            sized: parameters, each with its size.
            learn: how.
        """
        chosen = [(p, size) for p, size in sized if p.requires_grad]
        if learn is None or not chosen:
            return None
        parameters, there = [p for p, _ in chosen], chosen[0][0].is_cuda
        groups = [{"params": [p]} for p in parameters] if learn.relative and not there else [{"params": parameters}]
        sizes = [size for _, size in chosen] if learn.relative else [1.0]
        return cls(_optimizer(learn, groups, there), learn, parameters, sizes)

    def set_rate(self, progress: float) -> None:
        """Sets the learning rate of a point of the run, from 0 to 1."""
        self.rate = self.learn.rate_at(progress)

    def state(self) -> dict[str, Tensor]:
        """What the optimizer remembers, by the parameter's position and the name of the value."""
        return {
            f"{position}/{key}": torch.as_tensor(value).detach()
            for position, p in enumerate(self.parameters)
            for key, value in self.optimizer.state.get(p, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Puts back what :meth:`state` gave; an optimizer that has not taken a step remembers nothing."""
        for p in self.parameters:
            self.optimizer.state.pop(p, None)
        for position, p in enumerate(self.parameters):
            prefix = f"{position}/"
            kept = {n.removeprefix(prefix): t.clone() for n, t in state.items() if n.startswith(prefix)}
            if kept:
                self.optimizer.state[p] = {
                    n: t.to(p.device if p.is_cuda else "cpu") if n == "step" else _as(p, t) for n, t in kept.items()
                }


def optimizers_of(learner: Learner, rates: Rates) -> list[OptimizedPart]:
    """The optimizers of everything that a student learns."""
    weights, activations = list(learner.weights.values()), learner.activations.values()
    found = [
        OptimizedPart.of([(w.codes, 1.0) for w in weights], rates.codes),
        OptimizedPart.of([(w.step, float(w.step.detach().mean())) for w in weights], rates.weight_step),
        OptimizedPart.of([(b.bias, b.size) for b in learner.biases.values()], rates.bias),
        OptimizedPart.of([(a.step, float(a.step.detach())) for a in activations], rates.activation_step),
    ]
    parts = [part for part in found if part is not None]
    if parts and parts[0].parameters[0].is_cuda:
        for kind in {part.learn.optimizer for part in parts}:
            alike = [part for part in parts if part.learn.optimizer == kind]
            shared = _optimizer(
                alike[0].learn, [{"params": [p for part in alike for p in part.parameters]}], there=True
            )
            for part in alike:
                part.optimizer = shared
    return parts


def _optimizer(learn: Learn, groups: list[dict[str, list[nn.Parameter]]], there: bool) -> torch.optim.Optimizer:
    """Of one kind; ``there``: on a GPU."""
    rate = 1.0 if there else learn.rate
    if learn.optimizer == "sign":
        return SignDescent(groups, lr=rate)
    if learn.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, foreach=True)
    kind = torch.optim.Adam if learn.optimizer == "adam" else torch.optim.RAdam
    return kind(groups, lr=rate, foreach=True, capturable=there)


@torch.no_grad()
def move_parts(parts: Sequence[OptimizedPart], rates: Sequence[float | Tensor]) -> None:
    """Moves all parameters, from the gradients there are.

    Args:
        parts: kinds of variables.
        rates: of each; scalar tensors where they are recorded.
    """
    if not parts or not parts[0].parameters[0].is_cuda:
        for part, rate in zip(parts, rates, strict=True):
            for group, size in zip(part.optimizer.param_groups, part.sizes, strict=True):
                group["lr"] = float(rate) * size
            part.optimizer.step()
        return
    parameters: list[Tensor] = [p for part in parts for p in part.parameters]
    before = list(torch._foreach_add(parameters, 0.0))
    for optimizer in {id(part.optimizer): part.optimizer for part in parts}.values():
        optimizer.step()
    moved, position = list(torch._foreach_sub(parameters, before)), 0
    for part, rate in zip(parts, rates, strict=True):
        mine = moved[position : position + len(part.parameters)]
        position += len(mine)
        if part.learn.relative:
            torch._foreach_mul_(mine, part.sizes)
        torch._foreach_mul_(mine, rate)
    torch._foreach_add_(before, moved)
    torch._foreach_copy_(parameters, before)


def _as(p: Tensor, value: Tensor) -> Tensor:
    """On a parameter's device, in its order."""
    last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return value.to(p.device).to(memory_format=torch.channels_last if last else torch.contiguous_format)
