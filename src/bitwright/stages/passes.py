"""A pass over the images that several processes share: each sees some of the batches, all end with the same sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitwright import together
from bitwright.stages.base import Run, Streamed


class Stream(Protocol):
    """What depends on how many batches came before."""

    def skip(self, batches: int) -> None:
        """Goes past batches that another process sees, as large as the first one."""

    def forget(self) -> None:
        """The first batch counts in another process."""


def shared_pass(
    images: Streamed,
    run: Run,
    what: str,
    see: Callable[[Tensor], Sequence[Tensor]],
    add: Callable[[Sequence[Tensor]], None],
    streams: Sequence[Stream] = (),
) -> None:
    """Shows every batch to one process, and adds what it gives in all of them, in the order of the batches.

    The first batch is seen by all, who learn from it how large things are; the others are dealt out in turn.

    Args:
        images: to go through.
        run: batch size, device, progress.
        what: goes on, for people.
        see: takes a batch on the device, gives what is added, in the same shapes for every batch.
        add: takes that in.
        streams: are told which batches this process does not see.
    """
    if together.processes() == 1:
        for batch in run.batches(images, what):
            add(see(batch))
        return
    count, own = math.ceil(len(images) / run.batch), together.rank()
    found = see(_batch(images, run, 0))
    add(found)
    for stream in streams if own else ():
        stream.forget()
    passed = 1
    for start in range(1, count, together.processes()):
        run.progress(what, min(start * run.batch, len(images)), len(images))
        if start + own < count:
            for stream in streams:
                stream.skip(start + own - passed)
            found, passed = see(_batch(images, run, start + own)), start + own + 1
        for position, given in enumerate(together.exchanged(found), start):
            if position < count:
                add(given)
    run.progress(what, len(images), len(images))


def _batch(images: Streamed, run: Run, position: int) -> Tensor:
    start = position * run.batch
    return images.batch(range(start, min(start + run.batch, len(images)))).to(run.device)


def dealt_tensors(
    count: int, costs: Sequence[float], make: Callable[[int], Tensor], device: torch.device
) -> list[Tensor]:
    """``make(0), make(1), ...``, each made by one process, the dearest first, for all of them.

    Args:
        count: of tensors.
        costs: of each, in any unit.
        make: makes one.
        device: where they are wanted.
    """
    if together.processes() == 1:
        return [make(position) for position in range(count)]
    loads, owner = [0.0] * together.processes(), {}
    for position in sorted(range(count), key=lambda i: -costs[i]):
        owner[position] = min(range(len(loads)), key=loads.__getitem__)
        loads[owner[position]] += costs[position]
    mine = {position: make(position).cpu() for position in range(count) if owner[position] == together.rank()}
    return [each.to(device) for each in together.collected(mine, count)]
