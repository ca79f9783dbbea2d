"""How much memory a file takes in a runtime: run in a process of its own, so that nothing else counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bitwright.errors import BitwrightError
from bitwright.runtimes import runtime
from bitwright.runtimes.record import Runtime

STATUS = Path("/proc/self/status")
RUNS = 3
Shapes: TypeAlias = Mapping[str, Sequence[int]]


def peak_memory(where: Runtime, path: Path, shapes: Shapes, threads: int) -> dict[str, int]:
    """Largest resident size of a process that loads the file and runs it a few times.

    Args:
        where: the runtime.
        path: of the file.
        shapes: of the inputs by name, the batch first.
        threads: of the runtime.

    Returns:
        ``peak_bytes`` of the whole process, and ``above_start_bytes``, what the file added to it.

    Raises:
        BitwrightError: the process failed.
    """
    arguments = [where.name, str(path), str(threads), json.dumps({name: list(s) for name, s in shapes.items()})]
    done = subprocess.run(
        [sys.executable, "-m", "bitwright.speed.memory", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BitwrightError(f"The memory of {path.name} in {where.title} could not be measured ({reason}).")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _peak() -> int:
    """Peak memory of this process alone; what ``getrusage`` says includes the process that started this one."""
    try:
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        from bitwright.run.about import peak_memory_bytes

        return peak_memory_bytes()


def _main(arguments: Sequence[str]) -> None:
    kind, path, threads, shapes = arguments
    where = runtime(kind)
    __import__(str(where.package))
    feed = {name: np.zeros(shape, dtype=np.float32) for name, shape in json.loads(shapes).items()}
    start = _peak()
    call = where.loaded(Path(path), int(threads), feed)
    for _ in range(RUNS):
        call()
    print(json.dumps({"peak_bytes": _peak(), "above_start_bytes": _peak() - start}))


if __name__ == "__main__":
    _main(sys.argv[1:])
