"""What is done again and again on a GPU, recorded once and then launched as a whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WARM = 3
"""Steps of an optimisation before one is recorded: libraries take their memory, and optimizers their state."""


def can_record(device: torch.device) -> bool:
    """Whether steps can be recorded there."""
    return device.type == "cuda" and torch.version.cuda is not None


class Recording:
    """A step as a CUDA graph: thousands of kernels are launched as one, so that the GPU never waits for the host.

    What a step reads, it reads from tensors of the recording, into which those of each step are copied. What depends on
    the host is part of the way a step goes; a step that goes another way is recorded anew.

    Args:
        device: where.
        warm: how many steps of one way precede the one that is recorded.
    """

    def __init__(self, device: torch.device, warm: int = WARM) -> None:
        self.device, self.warm = device, warm
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """The next steps warm up again: tensors that the recording holds were replaced."""
        self.way: Hashable = None
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: list[Tensor] = []
        self.found: Tensor | None = None

    def is_warm(self, way: Hashable) -> bool:
        """Whether enough steps went this way, one after the other, to record the next."""
        if way != self.way:
            self.forget()
            self.way = way
        return self.seen >= self.warm

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, work goes where recordings are made: gradients are added where a variable was read first."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    @contextmanager
    def warming(self) -> Iterator[None]:
        """A step taken inside goes the way that was asked for last."""
        with self.beside():
            yield
        self.seen += 1

    def play(self, given: Sequence[Tensor], step: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
        """A step, recorded if it is not yet; None where it cannot be recorded, and nothing was done.

        Args:
            given: what it reads, of the same shapes every time.
            step: computes with copies of these, and gives what is to be known of the step.
        """
        if self.graph is None and not self._record(given, step):
            return None
        assert self.graph is not None
        assert self.found is not None
        torch._foreach_copy_(self.given, list(given))
        self.graph.replay()
        return self.found.clone()

    def _record(self, given: Sequence[Tensor], step: Callable[[list[Tensor]], Tensor]) -> bool:
        self.given = [t.detach().clone() for t in given]
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.found = step(self.given)
                finally:
                    graph.capture_end()
        except RuntimeError:  # out of memory, or an operator that waits for the host
            self.forget()
            torch.cuda.synchronize(self.device)
            return False
        self.graph = graph
        return True


class Repeated:
    """A function of tensors that is called many times with the same shapes, recorded at its second call on a GPU.

    Args:
        function: gives a tensor.
        device: where its tensors are.
        calls: how many there will be; few are not worth it.
    """

    def __init__(self, function: Callable[[list[Tensor]], Tensor], device: torch.device, calls: int) -> None:
        self.function = function
        self.recording = Recording(device, warm=1) if calls > 3 and can_record(device) else None

    def __call__(self, *given: Tensor) -> Tensor:
        """The function of these; they may be changed by it."""
        if self.recording is None:
            return self.function(list(given))
        if not self.recording.is_warm(tuple(t.shape for t in given)):
            with self.recording.warming():
                return self.function(list(given))
        found = self.recording.play(given, self.function)
        if found is None:
            self.recording = None
            return self.function(list(given))
        return found


def tidy() -> None:
    """Frees what nothing refers to any more: recordings have memory of their own."""
    gc.collect()
    torch.cuda.empty_cache()
