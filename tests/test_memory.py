"""Memory that stays mapped: page faults counted by the system, and glibc's limits as they are set."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest
import torch

from bitwright import memory
from bitwright.memory import PASS_BYTES, keep_pages, pass_budget, saved_bytes
from bitwright.stages.base import Run

resource = pytest.importorskip("resource")
PAGE = resource.getpagesize()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from malloc.h
needs_glibc = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")


FAULTS = """
import resource, torch
from bitwright import memory
from bitwright.memory import keep_pages

def fill(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults(size):
    return min(fill(size) for _ in range(6))  # once the heap has settled

"""
"""Counts page faults of filling two fresh tensors of a size one after the other."""


def alone(code: str) -> int:
    """The number that code prints in a process whose heap nobody else has used."""
    found = subprocess.run([sys.executable, "-c", FAULTS + code], check=True, capture_output=True, text=True)
    return int(found.stdout)


class _Calls:
    """Takes the place of the C library and remembers."""

    def __init__(self) -> None:
        self.limits: dict[int, int] = {}
        self.trims = 0

    def mallopt(self, name: int, value: int) -> int:
        self.limits[name] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trims += 1
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Calls:
    calls = _Calls()
    monkeypatch.setattr(memory, "_glibc", lambda: calls)
    return calls


@needs_glibc
def test_large_tensors_fault_no_pages_in_while_inside() -> None:
    size = 96 << 20  # by itself glibc would map and unmap it every time
    outside, inside = alone(f"print(faults({size}))"), alone(f"with keep_pages(): print(faults({size}))")
    assert inside < size / PAGE / 10 < outside


@needs_glibc
def test_tensors_of_usual_size_are_no_slower_afterwards() -> None:
    """Any call of mallopt ends glibc's own adjustment of its limits, so that they must be set where it ends."""
    size = 24 << 20
    started = f"memory._glibc().mallopt({M_MMAP_THRESHOLD}, 128 * 1024)\n"  # where a process starts
    assert alone(f"{started}with keep_pages(): pass\nprint(faults({size}))") < size / PAGE / 10


def test_limits_are_lifted_inside_and_usual_afterwards(library: _Calls) -> None:
    with keep_pages():
        assert library.limits == {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
        assert library.trims == 0
    usual = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # glibc's DEFAULT_MMAP_THRESHOLD_MAX
    assert library.limits == {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: usual, M_TRIM_THRESHOLD: 2 * usual}
    assert library.trims == 1


def test_one_inside_another_changes_nothing(library: _Calls) -> None:
    with keep_pages():
        with keep_pages():
            pass
        assert library.limits == {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
        assert library.trims == 0
    assert library.trims == 1
    with keep_pages():
        assert library.limits[M_MMAP_MAX] == 0


def test_limits_are_usual_again_after_an_error(library: _Calls) -> None:
    with pytest.raises(ValueError, match="inside"), keep_pages():
        raise ValueError("inside")
    assert library.limits[M_MMAP_MAX] == 65536
    assert library.trims == 1


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    ran = []
    with keep_pages():
        ran.append(True)
    with pytest.raises(ValueError, match="inside"), keep_pages():
        raise ValueError("inside")
    assert ran == [True]


def test_other_systems_and_libraries_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # a library without glibc's functions
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory._glibc() is None

    def missing(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert memory._glibc() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory._glibc() is None


def test_each_kept_storage_counts_once() -> None:
    x = torch.rand(10, 7, requires_grad=True)
    assert saved_bytes(lambda: x.exp().exp()) == 2 * x.nbytes  # an exponential keeps its result
    assert saved_bytes(lambda: x * x) == x.nbytes
    assert saved_bytes(lambda: x.flatten()[:7].sin() + x.flatten()[7:].sum()) == x.nbytes  # a view's whole storage
    assert saved_bytes(lambda: x + 1) == 0
    with torch.no_grad():
        assert saved_bytes(x.exp) == 0


def test_nothing_of_a_measured_pass_stays() -> None:
    x, made = torch.rand(10, 7, requires_grad=True), []

    def forward() -> torch.Tensor:
        made.append(weakref.ref(result := x.exp()))  # an exponential keeps its result
        return result.sum()

    assert saved_bytes(forward) == x.nbytes
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize(("gigabytes", "expected"), [(0.5, 1 << 28), (8, PASS_BYTES), (512, PASS_BYTES)])
def test_a_pass_may_take_half_of_the_memory_at_most(
    gigabytes: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = 4096
    told = {"SC_PAGE_SIZE": page, "SC_PHYS_PAGES": int(gigabytes * 2**30) // page}
    monkeypatch.setattr("os.sysconf", told.__getitem__)
    assert pass_budget(torch.device("cpu")) == expected


def test_a_machine_that_does_not_say_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")
    assert pass_budget(torch.device("cpu")) == PASS_BYTES


def test_what_a_phase_left_free_goes_back_at_its_end_though_pages_are_kept(library: _Calls) -> None:
    run = Run()
    with keep_pages():
        with run.timed("first"):
            assert library.trims == 0
        assert library.trims == 1
    assert set(run.seconds) == {"first"}
