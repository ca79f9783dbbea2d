"""What the goals on a GPU count: the arithmetic of a step, by hand, and the share of a peak."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitwright as bw
from benchmarks.gpu.goals import JOBS, counting, measured, share_of_peak


@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
def test_a_step_passes_every_layer_four_times() -> None:
    """Of the float network, of the quantized one, for its weights, and for its inputs, whose steps are learned."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    count = 6
    with counting() as found:
        made = bw.quantize(network, torch.randn(count, 3, 8, 8), "eptq", weights=8, activations=8, steps=1, seed=0)
    assert made.result["reconstruct"]["teacher"] == "live"
    views, batch = made.result["reconstruct"]["views"], made.result["reconstruct"]["batch"]
    assert batch <= count * views
    first, last = 2 * batch * 6 * 6 * 4 * 27, 2 * batch * 144 * 5
    assert found == [4 * (first + last)]


def test_share_of_the_peak_of_known_gpus() -> None:
    assert share_of_peak(67 * 10**9, 0.002, "float32", "NVIDIA H100 80GB HBM3") == 0.5
    assert share_of_peak(312 * 10**9, 0.01, "bfloat16", "NVIDIA A100-SXM4-40GB") == 0.1


@pytest.mark.parametrize(
    ("operations", "seconds", "precision", "hardware"),
    [
        (1, 0.1, "float32", "NVIDIA H100 PCIe"),
        (None, 0.1, "float32", "NVIDIA H200"),
        (1, None, "float32", "NVIDIA H200"),
        (1, 0.1, None, "NVIDIA H200"),
    ],
)
def test_no_share_where_something_is_not_known(
    operations: int | None, seconds: float | None, precision: str | None, hardware: str
) -> None:
    assert share_of_peak(operations, seconds, precision, hardware) is None


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_jobs_run(job: str) -> None:
    row = measured(JOBS[job], "cpu", tiny=True)
    assert row["share_of_peak"] is None
    assert (row["operations_per_step"] is None) == (job == "search")
