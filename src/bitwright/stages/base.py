"""What a stage is, and what it is given besides the model and the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from bitwright.capture import Captured
    from bitwright.data import Images
    from bitwright.quantized import QuantizedModel

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass
class Run:
    """What every stage shares: seed, device, batch size, progress, and what it leaves for the result."""

    seed: int = 0
    batch: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``seconds[what]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def batches(self, images: Images, what: str) -> Iterator[torch.Tensor]:
        """The images in batches on the device, [B, C, H, W], with progress."""
        done = 0
        self.progress(what, 0, len(images))
        for batch in images.batches(self.batch):
            yield batch.to(self.device)
            done += len(batch)
            self.progress(what, done, len(images))


class Stage(BaseModel):
    """One step of a recipe. Subclasses set ``kind``, the name that recipe files use, and their settings as fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Stage]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Stage.registry[cls.kind] = cls

    def run(self, student: QuantizedModel, teacher: Captured, images: Images, run: Run) -> QuantizedModel:
        """Improves the student; the teacher is never changed, and the images carry no labels."""
        raise NotImplementedError
