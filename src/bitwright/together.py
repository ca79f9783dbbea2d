"""Several processes on one job (``torchrun``): work is dealt out, and what is added is added in one order.

Every process runs the same program on the same images. What costs time is dealt out by position and exchanged again, so
that all of them go on with the same numbers, whatever their number is: sums are taken in the order of the images, and
gradients along one tree. Only :mod:`torch.distributed` talks: gloo on CPUs, NCCL on GPUs. Without a group of processes
everything here is the work of one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as group
from torch.distributed.rendezvous import rendezvous

from bitwright.errors import BitwrightError

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""After which a process that waits for another gives up; one that has ended is noticed within seconds."""
SAID = "bitwright/said"
"""Counts the processes that failed, so that one of them says why."""
_stores: list[Any] = []
_failed: list[int] = []
_inside: list[bool] = []


class LostError(BitwrightError):
    """Another process of the job has ended."""


def is_shared() -> bool:
    """Whether the job is that of the processes of a group, of which there may be one: see :func:`shared_job`."""
    return bool(_inside)


def processes() -> int:
    """How many processes work on the job."""
    return group.get_world_size() if _inside else 1


def rank() -> int:
    """Which of them this is; the first, 0, writes files and speaks."""
    return group.get_rank() if _inside else 0


def is_first() -> bool:
    """Whether this one writes and speaks."""
    return rank() == 0


def is_mine(position: int) -> bool:
    """Whether a piece of work is this process's."""
    return position % processes() == rank()


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


@contextlib.contextmanager
def shared_job() -> Iterator[None]:
    """Inside, the processes of a group do one job: those that ``torchrun`` started, or a group that is there already.

    Every process must call the same functions with the same arguments. Without a group it changes nothing.

    Raises:
        LostError: another process ended before its work was done.
    """
    there = group.is_available() and group.is_initialized()
    own = launched() and not there
    if _inside or not (own or there):
        yield
        return
    if own:
        _begin()
    _inside.append(True)
    try:
        with _told_to_end() if own else contextlib.nullcontext():
            yield
    except LostError:
        raise
    except BaseException:  # before the others find out that this one has gone
        with contextlib.suppress(RuntimeError):
            _failed.extend(int(store.add(SAID, 1)) for store in _stores)
        raise
    finally:
        _inside.clear()
        if own:
            with contextlib.suppress(RuntimeError):
                group.destroy_process_group()


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, the signal by which ``torchrun`` ends those that are left is an error like any other.

    After an error the signal is ignored, so that the process comes to say why it ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _lost()

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Inside, the first process works while the others do not wait for it, or have gone."""
    held, _inside[:] = list(_inside), []
    try:
        yield
    finally:
        _inside[:] = held


def _begin() -> None:
    """Joins those that ``torchrun`` started."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_gpu())
    store, own, count = next(rendezvous("env://"))
    _stores[:] = [store]
    group.init_process_group(backend, store=store, rank=own, world_size=count, timeout=PATIENCE)


def speaks(error: BaseException) -> bool:
    """Whether this process says what went wrong: the first that fails; of one that vanished, the first to notice."""
    if not _stores or not isinstance(error, LostError):
        return not _stores or _failed == [1]
    with contextlib.suppress(RuntimeError):
        return int(_stores[-1].add(SAID, 1)) == 1
    return os.environ["RANK"] == "1"  # the store is gone with process 0, which held it


def local_gpu() -> int:
    """Which GPU of its machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Names the reason where an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _lost() from error


def _lost() -> LostError:
    return LostError(
        f"Expected {processes()} processes until the end, found one gone or silent. Repeat the command with "
        "--resume: what was done is kept."
    )


# ---------------------------------------------------------------------------------------------------- exchange


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; plain data, or tensors on the CPU."""
    if processes() == 1:
        return make()
    held: list[Any] = [None]
    if is_first():
        with by_itself():
            held = [make()]
    with _talking():
        group.broadcast_object_list(held, src=0)
    found: T = held[0]
    return found


def collected(found: Mapping[int, T], count: int) -> list[T]:
    """Pieces of work by position, of which each process has its own: all ``count`` of them, in order, in all processes.

    Plain data, or tensors on the CPU.
    """
    if processes() == 1:
        return [found[i] for i in range(count)]
    parts: list[Any] = [None] * processes()
    with _talking():
        group.all_gather_object(parts, dict(found))
    every = {position: value for part in parts for position, value in part.items()}
    return [every[i] for i in range(count)]


def dealt(count: int, make: Callable[[int], T]) -> list[T]:
    """``make(0), make(1), ...``, in all processes, each made by the one that it belongs to; as in :func:`collected`."""
    return collected({i: make(i) for i in range(count) if is_mine(i)}, count)


def check_same(what: str) -> None:
    """All processes must have come to the same, as a text says it.

    Raises:
        BitwrightError: one has not.
    """
    if len(set(collected({rank(): what}, processes()))) > 1:
        raise BitwrightError(
            "The processes computed different numbers. Expected machines of one kind with as many threads each, "
            "found others: set OMP_NUM_THREADS, and take processors of one generation."
        )


def exchanged(mine: Sequence[Tensor]) -> list[list[Tensor]]:
    """What every process gives, by rank; all give tensors of the same shapes and dtypes."""
    if processes() == 1 or not mine:
        return [list(mine) for _ in range(processes())]
    rows = [torch.empty_like(flat := _flat(mine)) for _ in range(processes())]
    with _talking():
        group.all_gather(rows, flat)
    return [_unflat(row, mine) for row in rows]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """As bytes, end to end."""
    return torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors])


def _unflat(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(row, [t.numel() * t.element_size() for t in like])
    return [
        torch.empty_like(t).copy_(p.clone().view(t.dtype).reshape(t.shape)) for p, t in zip(parts, like, strict=True)
    ]


# ------------------------------------------------------------------------------------------- sums along a tree


def tree_sum(parts: int, of: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """The sum of ``of(0), of(1), ...``, always along one tree: ``((0 + 1) + (2 + 3)) + ((4 + 5) + ...)``.

    Each process computes a stretch of the parts, and sends the sums of whole branches.

    Args:
        parts: how many there are, the same whatever the number of processes is.
        of: gives a part.
        like: of the shape, dtype and device of every part.

    Example:
        >>> tree_sum(3, lambda part: torch.tensor([float(part)]), torch.empty(1))
        tensor([3.])
    """
    count = processes()
    stretches = [range(parts * r // count, parts * (r + 1) // count) for r in range(count)]
    branches = [_branches(_root(parts), stretch, parts) for stretch in stretches]
    mine = [_branch_sum(branch, parts, of, {}) for branch in branches[rank()]]
    rows = mine + [torch.zeros_like(like)] * (max(map(len, branches)) - len(mine))
    known: dict[range, Tensor] = {}
    for held, found in zip(branches, exchanged(rows), strict=True):
        known |= dict(zip(held, found, strict=False))
    return _branch_sum(_root(parts), parts, of, known)


def tree_gradients(learned: Sequence[Tensor], parts: int, of: Callable[[int], Tensor], told: int) -> Tensor:
    """Gradients of variables, and numbers beside them, summed over parts along one tree; gives the numbers, [K].

    Args:
        learned: the variables, whose gradients are replaced.
        parts: as for :func:`tree_sum`.
        of: runs the backward pass of a part and gives K numbers.
        told: K.
    """
    sizes = [told, *(p.numel() for p in learned)]

    def gradient(position: int) -> Tensor:
        for p in learned:
            p.grad = None
        numbers = of(position).detach().float()
        rows = (torch.zeros_like(p) if p.grad is None else p.grad for p in learned)
        return torch.cat([numbers, *(row.reshape(-1).float() for row in rows)])

    total = tree_sum(parts, gradient, torch.empty(sum(sizes), device=learned[0].device))
    numbers, *rows = torch.split(total, sizes)
    for p, row in zip(learned, rows, strict=True):
        p.grad = torch.empty_like(p).copy_(row.view(p.shape))
    return numbers


def _root(parts: int) -> range:
    return range(1 << (parts - 1).bit_length())


def _halves(branch: range) -> tuple[range, range]:
    middle = (branch.start + branch.stop) // 2
    return range(branch.start, middle), range(middle, branch.stop)


def _branches(branch: range, stretch: range, parts: int) -> list[range]:
    """The largest branches whose parts all lie in a stretch."""
    stop = min(branch.stop, parts)
    if stop <= max(branch.start, stretch.start) or branch.start >= stretch.stop:
        return []
    if stretch.start <= branch.start and stop <= stretch.stop:
        return [branch]
    left, right = _halves(branch)
    return [*_branches(left, stretch, parts), *_branches(right, stretch, parts)]


def _branch_sum(branch: range, parts: int, of: Callable[[int], Tensor], known: Mapping[range, Tensor]) -> Tensor:
    if branch in known:
        return known[branch]
    if len(branch) == 1:
        return of(branch.start)
    left, right = _halves(branch)
    found = _branch_sum(left, parts, of, known)
    return found if right.start >= parts else found + _branch_sum(right, parts, of, known)
