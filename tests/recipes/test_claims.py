"""What the papers say of their methods, on a small residual network, as far as it holds there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import small_network
from benchmarks.units import HELD, compared, given, quantized
from bitwright.given.images import Images, load_images
from bitwright.given.preprocessing import Preprocessing
from bitwright.graph.capture import Captured

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def subject() -> tuple[Captured, Images, Images]:
    """The network, images to calibrate on, and test images."""
    network = f"{Path(small_network.__file__)}:small_residual"
    return given(network, "zoo:fashion", "zoo:fashion-test[:1000]")


@cache
def divergence(name: str, bits: tuple[int, int], steps: int | None = None, seed: int = 0) -> float:
    """KL from float on test images, in nats."""
    teacher, images, test = subject()
    some = images[:-HELD].sample(256, seed=seed).unlabelled()
    return float(compared(quantized(teacher, some, name, bits, steps, seed)[0], teacher, test)["kl"])


def over_seeds(name: str, bits: tuple[int, int], steps: int | None = None) -> float:
    """Mean of three."""
    return mean(divergence(name, bits, steps, seed) for seed in range(3))


def test_closed_forms_beat_rounding() -> None:
    """OPTQ and OBQ (arXiv:2208.11580) at four bits, where neither has a stage behind it; which is ahead depends."""
    assert max(divergence("obq", (4, 8)), divergence("optq", (4, 8))) < 0.6 * divergence("mse", (4, 8))


@pytest.mark.slow
def test_learned_roundings_beat_nearest_and_dropped_activations_beat_steps_learned_afterwards() -> None:
    """AdaRound, BRECQ and QDrop at W2A4. That BRECQ beats AdaRound does not hold (docs/methods/brecq.md)."""
    nearest, adaround, brecq, qdrop = (over_seeds(n, (2, 4), 100) for n in ("mse", "adaround", "brecq", "qdrop"))
    assert max(adaround, brecq) < 0.6 * nearest
    assert qdrop < 0.9 * brecq


@pytest.mark.slow
def test_signs_of_gradients_beat_layers_and_all_beat_rounding() -> None:
    """AutoRound before AdaRound, AdaQuant and FIMA-Q; that FIMA-Q beats QDrop does not hold (docs/methods/fima.md)."""
    signs, nearest = over_seeds("autoround", (2, 4), 200), over_seeds("mse", (2, 4), 100)
    assert signs < 0.9 * over_seeds("adaround", (2, 4), 100)
    assert max(over_seeds(name, (2, 4), 100) for name in ("adaquant", "fima")) < 0.7 * nearest


@pytest.mark.slow
def test_labels_are_worth_something() -> None:
    """QKD (arXiv:1911.12491) from the start that the recipe without labels has, in right answers."""
    teacher, _, test = subject()
    lessons = load_images("zoo:fashion-test[2000:4000]", Preprocessing(**small_network.PREPROCESSING))

    def right(name: str, some: Images) -> float:
        seeds = range(3)
        return mean(compared(quantized(teacher, some, name, (2, 4), 600, s)[0], teacher, test)["top1"] for s in seeds)

    assert right("qkd", lessons) > right("optq", lessons.unlabelled())
