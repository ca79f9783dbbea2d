"""The search as such, without a network."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from bitwright.stages.population import FEWEST, Member, Mutation, Population, losing


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def member(fitness: float, born: int = 0) -> Member:
    return Member(fitness, born, torch.tensor([fitness]), torch.tensor([fitness]))


LEAST = torch.full((500,), 1e-6)


def test_a_relative_mutation_stays_within_its_part_of_every_scale() -> None:
    parent = torch.logspace(-4, 1, 500)
    child = Mutation(size=0.05, share=1.0).child(parent, LEAST, generator())
    ratio = child / parent - 1
    assert float(ratio.abs().max()) <= 0.05 + 1e-6
    assert float(ratio.max()) > 0.045
    assert float(ratio.min()) < -0.045
    assert len(ratio.unique()) > 400


def test_an_absolute_mutation_adds_the_same_to_small_and_large_scales_and_never_leaves_the_positive() -> None:
    parent = torch.cat([torch.full((250,), 1e-5), torch.full((250,), 1.0)])
    child = Mutation(size=1e-3, absolute=True, share=1.0).child(parent, LEAST, generator())
    assert float((child - parent)[250:].abs().max()) <= 1e-3 + 1e-6
    assert float((child - parent)[250:].abs().max()) > 9e-4
    assert bool((child >= LEAST).all())
    assert float(child[:250].max()) > 5e-4


def test_least_scales_hold() -> None:
    least = torch.full((500,), 0.99)
    child = Mutation(size=0.5, share=1.0).child(torch.ones(500), least, generator())
    assert float(child.min()) == pytest.approx(0.99)
    assert float(child.max()) > 1.4


@pytest.mark.parametrize(("share", "count"), [(0.1, 50), (1e-9, 1), (1.0, 500)])
def test_a_share_of_the_scales_changes(share: float, count: int) -> None:
    child = Mutation(share=share).child(torch.ones(500), LEAST, generator())
    assert int((child != 1).sum()) == count


@pytest.mark.parametrize("wrong", [{"size": 0.0}, {"share": 0.0}, {"share": 1.5}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Mutation(**wrong)  # type: ignore[arg-type]


def test_the_population_keeps_its_size_its_best_and_its_order() -> None:
    population = Population(member(1.0), 4)
    best = []
    for i, fitness in enumerate([2.0, 0.5, 0.7, 0.6, 0.9, 0.4, 3.0]):
        population.insert(member(fitness, i + 1))
        best.append(population.best.fitness)
        assert len(population.members) == 4
    assert best == list(itertools.accumulate([1.0, 0.5, 0.7, 0.6, 0.9, 0.4, 3.0], min))
    assert [m.fitness for m in population.members] == [0.4, 0.5, 0.6, 0.7]


def test_an_equal_newcomer_does_not_replace_anybody() -> None:
    population = Population(member(1.0), 3)
    assert not population.insert(member(1.0, 1))
    assert {m.born for m in population.members} == {0}


def test_a_population_of_one_keeps_the_better() -> None:
    population = Population(member(1.0), 1)
    assert not population.insert(member(1.1, 1))
    assert population.insert(member(0.9, 2))
    assert population.best.fitness == population.worst.fitness == 0.9


def test_a_large_tournament_finds_the_best_and_a_tournament_of_one_anybody() -> None:
    population = Population(member(9.0), 10)
    for i in range(10):
        population.insert(member(float(i), i + 1))
    draws = generator()
    assert {population.parent(200, draws).fitness for _ in range(20)} == {0.0}
    assert len({population.parent(1, draws).fitness for _ in range(200)}) == 10


def test_the_race_is_left_wrongly_as_seldom_as_stated() -> None:
    """Winners by a hair, judged by a tenth of the images: with error 5 % a winner leaves in 5 of 100 trials."""
    draws, wrong, trials = generator(3), 0, 2000
    for _ in range(trials):
        everything = torch.randn(400, generator=draws)
        everything -= everything.mean() + 1e-6
        wrong += losing(everything[:40], 400, 0.05)
    assert 0.03 < wrong / trials < 0.07


def test_clear_losers_leave_and_nobody_is_judged_by_few_or_by_all() -> None:
    worse = 1 + 0.1 * torch.randn(100, generator=generator())
    assert losing(worse[:50], 100, 1e-4)
    assert not losing(-worse[:50], 100, 0.4)
    assert not losing(worse[: FEWEST - 1], 100, 0.4)
    assert not losing(worse, 100, 0.4)
