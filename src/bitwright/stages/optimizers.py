"""The optimizers of an optimisation: one for each kind of variable, with its rate and its state."""

from __future__ import annotations

from collections.abc import Iterable
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
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


@dataclass
class OptimizedPart:
    """One kind of variable with its optimizer; rates relative to a parameter's size where that is its scale.

    On a GPU all parameters are one group, whose rate is 1: what a step changes is multiplied afterwards, by a rate that
    may be a tensor there. Rates of their own would be groups, and each group a dozen kernels.
    """

    optimizer: torch.optim.Optimizer
    learn: Learn
    parameters: list[nn.Parameter]
    sizes: list[float]
    rate: float | Tensor = 0.0

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
        rate = 1.0 if there else learn.rate
        optimizer: torch.optim.Optimizer
        if learn.optimizer == "sign":
            optimizer = SignDescent(groups, lr=rate)
        elif learn.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, foreach=True)
        elif learn.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, lr=rate, foreach=True, capturable=there)
        else:
            optimizer = torch.optim.RAdam(groups, lr=rate, foreach=True, capturable=there)
        return cls(optimizer, learn, parameters, sizes)

    def set_rate(self, progress: float) -> None:
        """Sets the learning rate of a point of the run, from 0 to 1."""
        self.rate = self.learn.rate_at(progress)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the parameters, from the gradients there are."""
        if not self.parameters[0].is_cuda:
            for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
                group["lr"] = float(self.rate) * size
            self.optimizer.step()
            return
        parameters: list[Tensor] = [*self.parameters]
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        moved = torch._foreach_sub(parameters, before)
        if self.learn.relative:
            torch._foreach_mul_(moved, self.sizes)
        torch._foreach_mul_(moved, self.rate)
        torch._foreach_add_(before, moved)
        torch._foreach_copy_(parameters, before)

    def state(self) -> dict[str, Tensor]:
        """What the optimizer remembers, by the parameter's position and the name of the value."""
        return {
            f"{position}/{key}": torch.as_tensor(value).detach()
            for position, p in enumerate(self.parameters)
            for key, value in self.optimizer.state.get(p, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Puts back what :meth:`state` gave; an optimizer that has not taken a step remembers nothing."""
        self.optimizer.state.clear()
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
    return [part for part in found if part is not None]


def _as(p: Tensor, value: Tensor) -> Tensor:
    """On a parameter's device, in its order."""
    last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return value.to(p.device).to(memory_format=torch.channels_last if last else torch.contiguous_format)
