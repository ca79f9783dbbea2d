"""All that there is to know of a runtime, in one record."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.errors import BitwrightError, UsageError
from bitwright.runtimes.session import Array
from bitwright.runtimes.target import Target

if TYPE_CHECKING:
    from bitwright.runtimes.rules import Rules

Loader = Callable[[Path, int, Mapping[str, Array]], Callable[[], None]]


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        target: what it can execute.
        title: its name for people.
        package: that runs it here; None where nothing does.
        load: ``load(path, threads, feed)`` gives a call that runs a file once on those inputs, for timings.
    """

    target: Target
    title: str
    package: str | None = None
    load: Loader | None = None

    @property
    def name(self) -> str:
        """As in ``--runtime``."""
        return self.target.name

    @property
    def rules(self) -> Rules | None:
        """How its integer kernels round, where that is known; the only part that needs PyTorch."""
        from bitwright.runtimes.rules import RULES

        return RULES.get(self.name)

    @property
    def runs_here(self) -> bool:
        """Whether files can be run in it, once its package is installed."""
        return self.load is not None

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return self.package is not None and importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return importlib.metadata.version(str(self.package))

    @property
    def remedy(self) -> str:
        """The line that installs it."""
        return f"pip install {self.package}"

    def require(self) -> None:
        """Checks that it is there.

        Raises:
            UsageError: it is not; with the line that installs it.
        """
        if not self.installed:
            raise UsageError(f"{self.title} is not installed. Install it with: {self.remedy}")

    def loaded(self, path: Path, threads: int, feed: Mapping[str, Array]) -> Callable[[], None]:
        """A call that runs a file once.

        Args:
            path: of the file.
            threads: of the runtime.
            feed: inputs by name, float32.

        Raises:
            BitwrightError: it does not run the file.
        """
        assert self.load is not None, f"{self.title} runs nothing here"
        return self.load(path, threads, feed)

    def reads(self, bits: int | None) -> bool:
        """Whether it reads files whose smallest integers have so many bits; None for those without any."""
        return bits is None or bits >= min(self.target.stores)

    def refusal(self, path: Path, error: Exception) -> BitwrightError:
        """What to say of a file that it does not run, whose own error says little."""
        bits = narrowest(path)
        if not self.reads(bits):
            return UsageError(
                f"{path.name} holds integers of {bits} bits, which {self.title} does not read. Quantize with "
                f"runtime='{self.name}'."
            )
        return BitwrightError(f"{self.title} does not run {path.name} ({line(error)}). Export it again.")


def narrowest(path: Path) -> int | None:
    """Bits of the smallest integers that an ONNX file stores; None if it has none or is no such file."""
    import onnx_ir

    try:
        stored = onnx_ir.load(path).graph.initializers.values()
        return min((v.dtype.bitwidth for v in stored if v.dtype is not None and v.dtype.is_integer()), default=None)
    except Exception:
        return None


def line(error: Exception) -> str:
    """An error of a runtime's own, in one short line."""
    return " ".join(str(error).split())[:200]
