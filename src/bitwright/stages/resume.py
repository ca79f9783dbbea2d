"""What an unfinished optimisation goes on from: its plan, and its state on disk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bitwright.run import checkpoint
from bitwright.stages.base import Run
from bitwright.stages.pace import Pace

CHECKPOINT = "reconstruct.safetensors"
CHECKPOINT_SECONDS = 20.0
CHECKPOINT_SHARE = 0.01
"""Share of the time that checkpoints may take."""
DONE = "done/"


class Resumable(Protocol):
    """An optimisation that can go on from a state."""

    step: int

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Goes on from a state."""


class KeptState:
    """The state of an optimisation on disk, written so seldom that it costs no time worth speaking of.

    Attributes:
        losses: of every step so far.
        units: what is known of the units that are done, as plain data.
        done: tensors of the student that those changed, by path.
    """

    def __init__(self, run: Run, plan: Pace) -> None:
        self.path = None if run.state is None else run.state / CHECKPOINT
        self.run, self.plan = run, plan
        self.last, self.cost = 0.0, 0.0
        self.losses: list[float] = []
        self.units: list[dict[str, Any] | None] = []
        self.done: dict[str, Tensor] = {}
        self._state: tuple[int, dict[str, Tensor]] | None = None

    @staticmethod
    def read(run: Run) -> KeptState | None:
        """The checkpoint of an unfinished run, None if there is none."""
        kept = None if run.state is None else checkpoint.read_last(run.state / CHECKPOINT)
        if kept is None or kept.header["identity"] != _identity(run):
            return None
        header, tensors = kept
        found = KeptState(run, Pace(**json.loads(header["plan"])))
        found.losses, found.units = json.loads(header["losses"]), json.loads(header.get("units", "[]"))
        found.done = {n.removeprefix(DONE): t.to(run.device) for n, t in tensors.items() if n.startswith(DONE)}
        found._state = int(header["step"]), {n: t for n, t in tensors.items() if not n.startswith(DONE)}
        return found

    def load(self, tuner: Resumable) -> None:
        """Puts the tuner where the unfinished run was; keeps the plan, if this is the first run."""
        if self._state is not None:
            step, tensors = self._state
            tuner.load(tensors, step)
            self._state, self.last = None, time.perf_counter()
        elif self.path is not None and not self.last:
            self.write(tuner, self.path)
            self.last = time.perf_counter()
        else:
            self.write_if_due(tuner)

    def is_due(self) -> bool:
        """Whether the time since the last one makes its cost small."""
        passed = time.perf_counter() - self.last
        return self.path is not None and passed >= max(CHECKPOINT_SECONDS, self.cost / CHECKPOINT_SHARE)

    def write_if_due(self, tuner: Resumable) -> None:
        """Once the time since the last one makes its cost small."""
        if self.path is None or not self.is_due():
            return
        start = time.perf_counter()
        self.write(tuner, self.path)
        self.last = time.perf_counter()
        self.cost = self.last - start

    def write(self, tuner: Resumable, path: Path) -> None:
        """Beside the one before, which is used if this one is damaged."""
        header = {
            "identity": _identity(self.run),
            "step": str(tuner.step),
            "plan": json.dumps(vars(self.plan)),
            "losses": json.dumps(self.losses),
            "units": json.dumps(self.units),
        }
        tensors = tuner.state() | {DONE + name: tensor for name, tensor in self.done.items()}
        checkpoint.write(path, tensors, header, previous=True)


def _identity(run: Run) -> str:
    return f"{run.identity} {len(run.history)}"
