"""The fitness functions: each against loops over its formula, and the properties that a search relies on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.stages.candidates import Fitness
from bitwright.stages.losses import cosine_distance, info_nce, kl_divergence, relative_error


def outputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def info_nce_by_loops(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    q, k = (x.flatten(1).double().tolist() for x in (student, teacher))
    found = []
    for n in range(len(q)):
        scores = [math.exp(cosine(q[n], k[m]) / temperature) for m in range(len(k))]
        found.append(-2 * temperature * math.log(scores[n] / sum(scores)))
    return found


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
@pytest.mark.parametrize("temperature", [3.0, 0.2])
def test_info_nce_is_its_formula(shape: tuple[int, ...], temperature: float) -> None:
    a, b = outputs(*shape), outputs(*shape, seed=1)
    assert info_nce(a, b, temperature).tolist() == pytest.approx(info_nce_by_loops(a, b, temperature), rel=1e-5)


def test_info_nce_follows_a_permutation_of_the_batch_and_ignores_lengths() -> None:
    a, b, order = outputs(6, 9), outputs(6, 9, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    plain = info_nce(a, b)
    assert torch.allclose(info_nce(a[order], b[order]), plain[order], atol=1e-5)
    lengths = torch.rand(6, 1) + 0.5
    assert torch.allclose(info_nce(a * lengths, b * 7), plain, atol=1e-5)


def test_info_nce_prefers_the_own_image_but_never_reaches_zero() -> None:
    teacher = outputs(100, 1000)
    matched, shuffled = (float(info_nce(x, teacher).mean()) for x in (teacher, teacher.roll(1, 0)))
    assert 0 < matched < 6 * math.log(100) < shuffled  # 6 log 100: an output that tells nothing
    student = teacher + 0.5 * outputs(100, 1000, seed=1)
    assert matched < float(info_nce(student, teacher).mean()) < 6 * math.log(100)


def test_info_nce_sees_negatives_of_the_teacher_only() -> None:
    teacher, student = outputs(4, 6), outputs(4, 6, seed=1)
    changed = student.clone()
    changed[1:] = outputs(3, 6, seed=2)
    assert float(info_nce(changed, teacher)[0]) == pytest.approx(float(info_nce(student, teacher)[0]), abs=1e-6)


def test_info_nce_of_one_image_is_refused() -> None:
    with pytest.raises(UsageError, match="at least two images"):
        info_nce(outputs(1, 5), outputs(1, 5))


def test_relative_error_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    mean_square = (1 + 0 + 0 + 9) / 4
    assert relative_error(student, teacher).tolist() == pytest.approx([2 / mean_square, 4.5 / mean_square])


def test_cosine_distance_by_hand() -> None:
    student, teacher = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1, -1]]),
    )
    assert cosine_distance(student, teacher).tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5)])
def test_kl_is_its_formula(shape: tuple[int, ...]) -> None:
    student, teacher = outputs(*shape), outputs(*shape, seed=1)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (x.reshape(4, -1).double().exp() for x in (s, t))
        total = 0.0
        for position in range(s.shape[1]):
            q, p = s[:, position] / s[:, position].sum(), t[:, position] / t[:, position].sum()
            total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        expected.append(total / s.shape[1])
    assert kl_divergence(student, teacher).tolist() == pytest.approx(expected, rel=1e-5)


def test_kl_of_probability_maps() -> None:
    p, q = torch.full((2, 1, 2, 2), 0.75), torch.full((2, 1, 2, 2), 0.5)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(q, p).tolist() == pytest.approx([expected, expected], rel=1e-5)


def test_kl_of_what_is_no_probability_is_refused() -> None:
    with pytest.raises(UsageError, match="class scores or probabilities"):
        kl_divergence(outputs(2, 1, 4, 4), outputs(2, 1, 4, 4))


@pytest.mark.parametrize("measure", ["infonce", "mse", "cosine", "kl"])
def test_several_outputs_count_equally_and_a_perfect_network_is_best(measure: str) -> None:
    teacher = [outputs(4, 3), outputs(4, 5, 2, 2, seed=1)]
    student = [t + 0.3 * torch.randn_like(t) for t in teacher]
    fitness = Fitness(measure)  # type: ignore[arg-type]
    apart = torch.stack([fitness([s], [t]) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(fitness(student, teacher), apart.mean(0))
    assert float(fitness(teacher, teacher).mean()) < float(fitness(student, teacher).mean())


def test_outputs_of_other_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="output="):
        Fitness("mse")([outputs(4, 3), outputs(8, 3)], [outputs(4, 3), outputs(8, 3)])
