"""``bitwright.bench``: how fast a run's exported file is, beside the float network, in the runtimes that are there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.given.arguments import a_time
from bitwright.given.text import read_json
from bitwright.progress import Progress, watched
from bitwright.run.files import write_json
from bitwright.run.folder import BENCH, ONNX, RESULT, STATE, check_file, check_takes_files
from bitwright.run.result import RunResult
from bitwright.runtimes import absent, chosen
from bitwright.runtimes.onnxruntime import ONNXRUNTIME, patient_options
from bitwright.runtimes.record import Runtime
from bitwright.runtimes.session import dtype_of
from bitwright.speed import kernels
from bitwright.speed.float_operators import float_operators
from bitwright.speed.machine import cores, cpu_name
from bitwright.speed.memory import Shapes, peak_memory
from bitwright.speed.record import BenchRecord, FileSpeed, Machine, SpeedRow, TimedRuntime
from bitwright.speed.timing import Spread, Timer, in_turn, ratios
from bitwright.words import typed

if TYPE_CHECKING:
    import onnx_ir as ir

BATCHES = (1, 32)
SECONDS = 20.0
FLOAT_FILE = "float.onnx"
WHAT_FLOAT_IS = (
    "the same file without its quantizers: the same operators on the same shapes, batch norms folded, computed in "
    "float with the rounded weights, on whose values speed does not depend"
)
Memory = Callable[[Runtime, Path, Shapes, int], dict[str, int]]


MOST_THREADS = 1024
MOST_IMAGES = 1 << 16


@dataclass(frozen=True)
class _Files:
    """What is compared."""

    quantized: Path
    float: Path
    inputs: Shapes
    """Shape of each input by name; 0 for the number of images."""
    batch: int | None
    """Images that the file takes at once; None for any number."""
    doubtful: bool
    """Whether its outputs do not say that they have the axis of images first."""

    def of(self, batch: int) -> Shapes:
        """The same for so many images."""
        return {name: tuple(side or batch for side in shape) for name, shape in self.inputs.items()}

    @property
    def usual(self) -> tuple[int, ...]:
        """Images in one call, where nobody says: as many as the file fixes, or those of :data:`BATCHES` that it takes.

        What suppresses boxes behind a network may take one image alone, which only running it tells.
        """
        if self.batch is not None:
            return (self.batch,)
        return tuple(batch for batch in BATCHES if batch == 1 or not self.doubtful or self._takes(batch))

    def _takes(self, batch: int) -> bool:
        import onnxruntime

        options = patient_options()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(str(self.quantized), options, providers=["CPUExecutionProvider"])
            kinds, shapes = {i.name: dtype_of(i.type) for i in session.get_inputs()}, self.of(batch)
            session.run(None, {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()})
        except Exception:
            return False
        return True


def bench(
    run: str | Path,
    *,
    runtimes: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    seconds: float = SECONDS,
    measure: Timer | None = None,
    memory: Memory | None = None,
    progress: Progress | bool = True,
) -> dict[str, Any]:
    """Times a run's ``model.onnx`` and the float network in turn, and writes ``bench.json`` into the run folder.

    Args:
        run: a finished run folder with a ``model.onnx`` in it.
        runtimes: out of onnxruntime and openvino; those that are installed if not given.
        batches: images in one call, each measured for itself; if not given, 1 and 32 where the file takes them, else
            as many as it takes.
        threads: of the runtime, each measured for itself; 1 and all if not given.
        seconds: for all timings together, warming up left out. Five rounds are run even where that takes longer.
        measure: times some calls; :func:`bitwright.speed.timing.in_turn` if not given.
        memory: measures the peak memory of a file; in a process of its own if not given.
        progress: as for :func:`bitwright.quantize`.

    Returns:
        What ``bench.json`` holds: the machine, ``runtimes``, ``absent`` ones with the line that installs them, and
        ``rows``, one for each runtime, number of threads and batch, with seconds (median and quartiles), images per
        second and memory of both files, and the ratio of their times, quantized over float.

    Raises:
        UsageError: there is no finished run or no ``model.onnx`` in it, its folder cannot be written, an argument is
            out of range, or a runtime that was asked for is not installed.
        BitwrightError: a runtime does not run the file.
    """
    folder = Path(run).expanduser()
    path = file_to_time(folder)
    places = chosen(runtimes, path)
    threads = tuple(dict.fromkeys((1, cores()) if threads is None else threads))
    _check(BATCHES if batches is None else batches, threads, seconds)
    check_takes_files(folder)
    with tempfile.TemporaryDirectory() as scratch, watched(progress) as told:
        files = _files(path, Path(scratch))
        sizes = files.usual if batches is None else tuple(dict.fromkeys(batches))
        settings = [(r, t, b) for r in places for t in threads for b in sizes]
        timer = measure or partial(in_turn, seconds=seconds / len(settings))
        rows = []
        for done, (where, count, batch) in enumerate(settings):
            told("Timing", done, len(settings), f"{where.title}, {_threads(count)}, batch {batch}")
            rows.append(_row(files, where, count, batch, timer, memory or peak_memory))
        told("Timing", len(settings), len(settings))
        found = BenchRecord(
            bitwright=__version__,
            run=str(folder),
            machine=Machine(cpu_name(), cores(), _load()),
            what=WHAT_FLOAT_IS,
            bytes={"quantized": _bytes(files.quantized), "float": _bytes(files.float)},
            runtimes=[_about(r, files) for r in places],
            absent=absent(),
            rows=rows,
        ).plain()
    write_json(folder / BENCH, found)
    return found


# -------------------------------------------------------------------------------------------------- what is asked


def file_to_time(folder: Path) -> Path:
    """The ONNX file of a finished run.

    Raises:
        UsageError: there is no finished run, or no such file in it, or another one than the run wrote.
    """
    if not folder.is_dir():
        raise UsageError(f"Expected a run folder, found none at {folder}. Check the path.")
    if (folder / STATE).is_dir() and not (folder / RESULT).is_file():
        raise UsageError(f"The run in {folder} is unfinished. Repeat its command with --resume.")
    if not (folder / RESULT).is_file():
        raise UsageError(f"Expected a run folder with {RESULT} in it, found none in {folder}. Give a run's folder.")
    advice = f"Write it with: {typed('bitwright', 'export', folder)}"
    if not (folder / ONNX).is_file():
        raise UsageError(f"Expected {ONNX} in {folder}, found none. {advice}")
    files = RunResult.read(read_json(folder / RESULT), folder / RESULT).files
    check_file(folder, ONNX, files, advice)
    return folder / ONNX


def _check(batches: Sequence[int], threads: Sequence[int], seconds: float) -> None:
    for what, values in (("batch", batches), ("number of threads", threads)):
        if not values or min(values) < 1:
            raise UsageError(f"Expected a {what} of at least 1, found {', '.join(map(str, values)) or 'none'}.")
    for what, values, most in (("images", batches, MOST_IMAGES), ("threads", threads, MOST_THREADS)):
        if max(values) > most:
            raise UsageError(f"Expected at most {most} {what}, found {max(values)}.")
    a_time("seconds", seconds, "seconds")


def _files(path: Path, scratch: Path) -> _Files:
    import onnx_ir

    from bitwright.runtimes.session import save_onnx
    from bitwright.speed.float_twin import float_twin

    try:
        program: ir.Model = onnx_ir.load(path)
        given = {str(v.name): list(v.shape or ()) for v in program.graph.inputs}
        inputs = {name: _shape(sides) for name, sides in given.items()}
        first = {str(sides[0]) for sides in given.values() if len(sides) > 1}
        doubtful = any(not v.shape or str(v.shape[0]) not in first for v in program.graph.outputs)
        fixed = [sides[0] for sides in given.values() if len(sides) > 1 and isinstance(sides[0], int)]
    except Exception as error:
        raise UsageError(f"{path} is not a file that bitwright exported. Export the run again.") from error
    save_onnx(float_twin(program), scratch / FLOAT_FILE)
    return _Files(path, scratch / FLOAT_FILE, inputs, fixed[0] if fixed else None, doubtful)


def _shape(sides: Sequence[Any]) -> tuple[int, ...]:
    """That of an input, 0 for the number of images, which numbers beside them have no axis for."""
    first = sides[:1] if len(sides) == 1 and isinstance(sides[0], int) else [0] * len(sides[:1])
    return tuple(int(side) for side in (*first, *sides[1:]))


# ------------------------------------------------------------------------------------------------ what is measured


def _row(files: _Files, where: Runtime, threads: int, batch: int, measure: Timer, memory: Memory) -> SpeedRow:
    """One runtime, number of threads and batch."""
    shapes, numbers = files.of(batch), np.random.default_rng(0)
    feed = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    pair = (files.float, files.quantized)
    times = measure([where.loaded(path, threads, feed) for path in pair])
    peaks = [memory(where, path, shapes, threads) for path in pair]
    reference, quantized = (_speed(t, batch, peak) for t, peak in zip(times, peaks, strict=True))
    return SpeedRow(
        runtime=where.name,
        threads=threads,
        batch=batch,
        reference=reference,
        quantized=quantized,
        ratio=Spread.of(ratios(times[1], times[0])),
    )


def _speed(samples: Sequence[float], batch: int, peak: Mapping[str, int]) -> FileSpeed:
    spread = Spread.of(samples)
    return FileSpeed(**vars(spread), images_per_second=batch / spread.median if spread.median > 0 else 0.0, **peak)


def _about(where: Runtime, files: _Files) -> TimedRuntime:
    """Name and version; of ONNX Runtime also what it makes of the two files, and what of the quantized one is float."""
    if where is not ONNXRUNTIME:
        return TimedRuntime(where.name, where.version)
    quantized = kernels.optimized(files.quantized)
    found = {"float": kernels.kernels(files.float), "quantized": kernels.counted(quantized)}
    products = {name: kernels.products(counts) for name, counts in found.items()}
    return TimedRuntime(where.name, where.version, found, products, float_operators(quantized))


def _bytes(path: Path) -> int:
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def _load() -> float | None:
    """Processes that wanted a core during the last minute, these timings among them."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
