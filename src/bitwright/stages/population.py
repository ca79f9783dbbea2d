"""Evolutionary search itself: a population, its tournament, mutation, and a race that losers leave early."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from bitwright.stages.schedules import FrozenSettings

POPULATION, TOURNAMENT, CYCLES = 15, 10, 3
"""Evol-Q's: members; those drawn, with replacement, of which the fittest is the parent; children for each visit."""
FEWEST = 16
"""Images before anything is said about a candidate."""


class Mutation(FrozenSettings):
    """What a child's scales differ by from its parent's.

    Every scale gets a uniform number out of [-size, size]: a part of itself, or added as it is (``absolute``, the
    paper's). A child that would be zero or below is its absolute value.
    """

    size: float = Field(default=0.1, gt=0)
    absolute: bool = False
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of the scales that change, drawn anew for every child; at least one scale changes."""

    def child(self, parent: Tensor, least: Tensor, generator: torch.Generator) -> Tensor:
        """Scales [D] around the parent's [D], none below ``least``."""
        noise = (torch.rand(len(parent), generator=generator, dtype=torch.float64) * 2 - 1) * self.size
        if self.share < 1:
            count = max(1, round(self.share * len(parent)))
            kept = torch.zeros(len(parent), dtype=torch.float64)
            kept[torch.randperm(len(parent), generator=generator)[:count]] = 1
            noise *= kept
        noise = noise.to(parent.device)
        moved = parent.double() + noise if self.absolute else parent.double() * (1 + noise)
        return torch.maximum(moved.abs().float(), least)


@dataclass(frozen=True)
class Member:
    """A point of the search.

    Attributes:
        fitness: lower is better.
        born: the order in which members came, which decides between equals.
        scales: [D].
        losses: the fitness of every image, [N].
    """

    fitness: float
    born: int
    scales: Tensor
    losses: Tensor

    @property
    def rank(self) -> tuple[float, int]:
        """What members are ordered by."""
        return self.fitness, self.born


class Population:
    """The fittest members, at first copies of one (Evol-Q, algorithm 1)."""

    def __init__(self, start: Member, size: int) -> None:
        self.members = [start] * size

    @property
    def best(self) -> Member:
        """The fittest."""
        return self.members[0]

    @property
    def worst(self) -> Member:
        """The one that a new member has to beat."""
        return self.members[-1]

    def parent(self, drawn: int, generator: torch.Generator) -> Member:
        """The fittest of some members drawn with replacement."""
        places = torch.randint(len(self.members), (drawn,), generator=generator)
        return self.members[int(places.min())]

    def insert(self, member: Member) -> bool:
        """Takes the member in and drops the worst; whether the member is the new best."""
        bisect.insort(self.members, member, key=lambda m: m.rank)
        self.members.pop()
        return self.best is member


def losing(differences: Tensor, total: int, error: float) -> bool:
    """Whether a candidate is worse than its rival on all images, judged by a part of them.

    The images looked at are a random part without replacement of ``total``, so that the mean's standard error is
    ``s sqrt((1 - n / total) / n)``; the bound is Student's quantile.

    Args:
        differences: the candidate's loss minus the rival's, [n].
        total: images altogether.
        error: probability of saying so of one that is not worse.

    Example:
        >>> losing(torch.full((20,), 0.1), 100, 0.01), losing(torch.tensor([0.5, -0.5] * 10), 100, 0.01)
        (True, False)
    """
    n = len(differences)
    if n < FEWEST or n >= total:
        return False
    from scipy.special import stdtrit  # half a second to import

    mean, spread = float(differences.mean()), float(differences.std())
    return mean > float(stdtrit(n - 1, 1 - error)) * spread * math.sqrt((1 - n / total) / n)
