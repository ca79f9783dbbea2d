"""A pass over the images that several processes share: each sees some of the batches, all end with the same sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright import together
from bitwright.graph.capture import Captured
from bitwright.graph.watch import Callback, watch
from bitwright.stages.base import Run, Stream, Streamed, Sums


def sum_up(teacher: Captured, images: Streamed, run: Run, what: str, *sums: Sums) -> None:
    """Shows the float network's values on the images to all of the sums in one pass.

    Args:
        teacher: the float network.
        images: to go through.
        run: batch size, device, progress.
        what: goes on, for people.
        sums: that are made.
    """
    whole = Several(sums)

    def see(batch: Tensor) -> list[Tensor]:
        watch(teacher.graph, batch, whole.callbacks)
        return whole.taken()

    shared_pass(images, run, what, see, whole.add, whole.streams)


class Several:
    """Sums that are made in one pass.

    Args:
        parts: those.
    """

    def __init__(self, parts: Sequence[Sums]) -> None:
        self.parts = parts
        self.streams = [stream for each in parts for stream in each.streams]
        self.callbacks: dict[str, Callback] = {}
        for name in dict.fromkeys(name for each in parts for name in each.callbacks):
            self.callbacks[name] = _all_of([each.callbacks[name] for each in parts if name in each.callbacks])
        self._lengths: list[int] = []

    def taken(self) -> list[Tensor]:
        """What the last batch adds to each, one behind the other."""
        found = [each.taken() for each in self.parts]
        self._lengths = list(map(len, found))
        return [tensor for each in found for tensor in each]

    def add(self, given: Sequence[Tensor]) -> None:
        """Takes in what :meth:`taken` gave, here or in another process."""
        start = 0
        for each, length in zip(self.parts, self._lengths, strict=True):
            each.add(given[start : start + length])
            start += length


def _all_of(callbacks: Sequence[Callback]) -> Callback:
    def show(node: fx.Node, value: Any) -> None:
        for callback in callbacks:
            callback(node, value)

    return show


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
    return images.batch(range(start, min(start + run.batch, len(images))), run.device)


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
