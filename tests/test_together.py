"""Several processes do one job: the file is the same, however many there are."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import distributed, multiprocessing

import bitwright as bw
from bitwright import together
from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.evolve import Evolve

IMAGES = 72
"""Three batches, of which the last is not full."""


def in_processes(count: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What each of so many processes returns; the parent is forked, so that nothing is imported again."""
    context = multiprocessing.get_context("fork")
    queue, store = context.Queue(), folder / f"store-{count}"

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        try:
            with together.shared_job():
                queue.put((rank, work()))
        except Exception as error:
            queue.put((rank, f"{type(error).__name__}: {error}"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks
        started = [context.Process(target=one, args=(rank,), daemon=True) for rank in range(count)]
        for process in started:
            process.start()
    found = dict(queue.get(timeout=240) for _ in started)
    for process in started:
        process.join(30)
    return [found[rank] for rank in range(count)]


def file_of(make: Callable[[], torch.nn.Module], method: Any, **said: Any) -> str:
    """The sha256 of what a run writes."""
    torch.manual_seed(0)
    network = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bw.quantize(
            network, cases.dataset(IMAGES), method, weights=4, device="cpu", precision="float32", **said
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(found.graph.named_buffers()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


EVOLVED = Recipe(
    name="own", summary="", paper="", stages=(Calibrate(bias_correction="analytic"), Evolve(passes=1, batch=10))
)
CLOSED: dict[str, Any] = {
    "mse": (cases.SqueezeExcite, "mse"),
    "optq": (cases.Residual, "optq"),
    "evolve": (cases.Residual, EVOLVED),
}
LEARNED: dict[str, Any] = {"eptq": (cases.SqueezeExcite, "eptq"), "qdrop": (cases.Residual, "qdrop")}


@pytest.mark.parametrize("name", CLOSED)
def test_processes_write_the_file_of_one(name: str, tmp_path: Path) -> None:
    make, method = CLOSED[name]
    alone = file_of(make, method)
    for count in (2, 3):
        assert in_processes(count, tmp_path, lambda: file_of(make, method)) == [alone] * count


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_do_not_depend_on_the_number_of_processes(name: str, tmp_path: Path) -> None:
    make, method = LEARNED[name]
    files = [in_processes(n, tmp_path, lambda: file_of(make, method, steps=4)) for n in (1, 2, 3)]
    assert {each for found in files for each in found} == {files[0][0]}
    assert ":" not in files[0][0], files[0][0]
