"""Several processes do one job: the file is the same, however many there are."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import distributed, multiprocessing

import bitwright as bw
from bitwright import api, together
from bitwright.recipes import Recipe
from bitwright.sensitivity import Choices, MeasuredLoss, predicted_losses
from bitwright.sensitivity.report import CurvatureSettings, measure_curvature
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.evolve import Evolve
from bitwright.stages.optq import Optq
from bitwright.stages.tuning import Tuner

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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As each of the processes has: sums of several threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the fork, since capturing takes longer than all the rest."""
    prepared = {type(cases.model(name)): cases.prepared(name) for name in ("squeeze_excite", "residual")}
    monkeypatch.setattr(api, "prepare_teacher", lambda network, *_: copy.deepcopy(prepared[type(network.module)]))


def quantized(name: str, method: Any, images: int = IMAGES, **said: Any) -> tuple[str, Any]:
    """The sha256 of all that a run ends with, and what it tells of its optimisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bw.quantize(
            cases.model(name), cases.dataset(images), method, weights=4, device="cpu", precision="float32", **said
        )
    return digest_of(found.graph), found.result.get("reconstruct")


def digest_of(graph: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(graph.named_buffers()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


CALIBRATED = Calibrate(bias_correction="analytic")
ROUNDED = Recipe(name="own", summary="", paper="", stages=(CALIBRATED, Optq(positions=7)))
EVOLVED = Recipe(name="own", summary="", paper="", stages=(CALIBRATED, Evolve(passes=1, batch=10)))


@pytest.mark.parametrize(
    ("name", "method"),
    [("squeeze_excite", "mse"), ("residual", ROUNDED), ("residual", EVOLVED)],
    ids=["mse", "optq", "evolve"],
)
def test_processes_write_the_file_of_one(name: str, method: Any, tmp_path: Path) -> None:
    alone = quantized(name, method)[0]
    for count in (2, 3):
        assert in_processes(count, tmp_path, lambda: quantized(name, method)[0]) == [alone] * count


@pytest.mark.parametrize(("name", "method"), [("squeeze_excite", "eptq"), ("residual", "qdrop")])
def test_gradients_do_not_depend_on_the_number_of_processes(name: str, method: str, tmp_path: Path) -> None:
    files = [in_processes(n, tmp_path, lambda: quantized(name, method, steps=3)[0]) for n in (1, 2, 3)]
    assert {each for found in files for each in found} == {files[0][0]}
    assert len(files[0][0]) == 64, files[0][0]


def test_training_with_labels_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    images = cases.dataset(20).labelled([i % 4 for i in range(20)])

    def work() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = bw.quantize(cases.model("residual"), images, "qkd", weights=4, device="cpu", steps=5)
        return digest_of(found.graph)

    files = [in_processes(n, tmp_path, work) for n in (1, 2, 3)]
    assert {each for found in files for each in found} == {files[0][0]}
    assert len(files[0][0]) == 64, files[0][0]


def test_measured_losses_are_those_of_one_process(tmp_path: Path) -> None:
    def work(folder: Path) -> list[dict[str, Any]]:
        teacher, choices = cases.prepared("residual"), Choices(weights=(2, 4), activations=(4,))
        asked = teacher, cases.dataset(40), choices, Run(batch=16)
        return [predicted_losses(MeasuredLoss(), *asked, kept).to_dict() for kept in (None, folder, folder)]

    alone = work(tmp_path / "1")
    for count in (2, 3):
        assert in_processes(count, tmp_path, lambda: work(tmp_path / str(count))) == [alone] * count  # noqa: B023
        assert len(list((tmp_path / str(count)).iterdir())) == 1


def test_curvature_is_that_of_one_process(tmp_path: Path) -> None:
    def work() -> str:
        teacher = cases.prepared("residual")
        settings = CurvatureSettings(steps=4, spectrum_samples=8, probes=4)
        return repr(measure_curvature(teacher, cases.dataset(20), settings, Run(batch=8)))

    alone = work()
    for count in (2, 3):
        assert in_processes(count, tmp_path, work) == [alone] * count


def test_processes_without_a_batch_wait_for_the_one_that_has_it(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, lambda: quantized("squeeze_excite", "eptq", images=12, steps=2)[0])
    assert found[0] == found[1]
    assert len(found[0]) == 64, found[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_added_along_one_tree(count: int, tmp_path: Path) -> None:
    parts = [1e8, 1.0, -1e8, 1.0, 3.0]  # one after the other they are 4; in other pairs 5

    def work() -> float:
        return float(together.tree_sum(5, lambda i: torch.tensor([parts[i]]), torch.empty(1)))

    assert in_processes(count, tmp_path, work) == [3.0] * count


def test_a_process_that_fails_ends_the_others_within_seconds(tmp_path: Path) -> None:
    def work() -> None:
        if together.rank() == 1:
            raise ValueError("this one is broken")
        together.check_same("the others wait here")

    started = time.monotonic()
    found = in_processes(3, tmp_path, work)
    assert found[1] == "ValueError: this one is broken"
    assert all(found[rank].startswith("LostError: Expected 3 processes until the end") for rank in (0, 2))
    assert time.monotonic() - started < 20


def test_the_signal_of_torchrun_is_told_as_a_process_that_has_gone() -> None:
    def killed() -> None:
        with together._told_to_end():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(together.LostError, match="found one gone"):
            killed()
        os.kill(os.getpid(), signal.SIGTERM)  # while it says so
        signal.signal(signal.SIGTERM, before)
        with together._told_to_end():
            pass
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_numbers_are_found_out(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, lambda: together.check_same(f"digest {together.rank()}"))
    assert all("The processes computed different numbers" in each for each in found)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    own = Tuner._terms

    def terms(tuner: Tuner, *given: Any) -> torch.Tensor:
        found = own(tuner, *given)
        return found * torch.nan if together.rank() == 1 and tuner.step == 2 else found

    def work() -> tuple[str, Any]:
        Tuner._terms = terms  # type: ignore[method-assign]
        digest, told = quantized("residual", "eptq", steps=4)
        return digest, told["stopped"]

    first, second = in_processes(2, tmp_path, work)
    assert first == second
    assert first[1] == {"layer": "stem", "step": 2}


def test_a_group_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    def work() -> int:
        with together.by_itself():
            return together.processes()

    assert in_processes(2, tmp_path, work) == [1, 1]


# ------------------------------------------------------------------------------------------------------- torchrun

SMALL = ["--samples", "32", "--steps", "20", "--device", "cpu", "--precision", "float32"]
COMMAND = ["quantize", "zoo:fashion_cnn", "zoo:fashion", "--recipe", "eptq", "--weights", "4", *SMALL]


def torchrun(count: int, *more: str) -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return [*program, "-m", "bitwright", *COMMAND, *more]


def _members(parent: int) -> Iterator[tuple[int, int]]:
    """(rank, process) of those that torchrun started."""
    for entry in Path("/proc").iterdir():
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                said = dict(line.split("=", 1) for line in (entry / "environ").read_text().split("\0") if "=" in line)
                yield int(said["RANK"]), int(entry.name)
        except (OSError, ValueError, KeyError, IndexError):
            continue


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_kill_leaves_a_run_that_any_number_of_processes_goes_on_with(rank: int, tmp_path: Path) -> None:
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    with subprocess.Popen(torchrun(2, "--out", str(begun)), stderr=subprocess.PIPE, text=True) as running:
        while not (begun / "state" / "reconstruct.safetensors").exists():
            assert running.poll() is None
            time.sleep(0.1)
        os.kill(dict(_members(running.pid))[rank], signal.SIGKILL)
        killed = time.monotonic()
        _, said = running.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    subprocess.run(torchrun(3, "--out", str(begun), "--resume"), check=True, capture_output=True)
    subprocess.run(torchrun(1, "--out", str(whole)), check=True, capture_output=True)
    files = [(folder / "model.safetensors").read_bytes() for folder in (begun, whole)]
    assert files[0] == files[1]
