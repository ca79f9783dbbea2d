"""Which networks go through bitwright: captured, quantized to W8A8, written as ONNX, checked in ONNX Runtime.

The smallest network of each of timm's families, torchvision's families and small networks of transformers, with
seeded weights and no downloads (:mod:`benchmarks.coverage_networks`). Each runs in a process of its own with a limit of
time. A network that is not done says in one line why; nothing is left out. Rows are added to a file one by one, and
what is there is not made again.

    python -m benchmarks.coverage                        # what is missing, then docs/coverage.md
    python -m benchmarks.coverage --only swin            # networks whose name holds that
    python -m benchmarks.coverage --retry-failed         # those that were not done
    python -m benchmarks.coverage --fresh                # all again
    python -m benchmarks.coverage --table                # only the page, from the rows that are there
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, fx, nn

import bitwright as bw
from benchmarks import coverage_networks
from benchmarks.written import where
from bitwright.errors import BitwrightError
from bitwright.given.compat import import_timm
from bitwright.measure.metrics import SignalToNoise

Row = dict[str, Any]
Found = dict[str, Any]
Run = Callable[[Tensor], list[Tensor]]

LIMIT = 300
"""Seconds of one core that a network may take."""
LIBRARIES_OF_EXPORT = (
    "bitwright.measure.evaluation",
    "bitwright.export.parity",
    "onnxscript.function_libs.torch_lib.ops",
    "scipy.optimize",
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._torchlib.ops",
)
PATIENCE = 5
"""Times that limit by the clock, for a process that waits."""
IMAGES = 8
"""To calibrate; as many others to measure and to check the file."""
RECIPE = "mse"
LOW = 10.0
"""Decibels below which a row says why."""
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
ROWS = Path("build/coverage.json")
REASONS = {
    "timm:coat_tiny": "It falls in the class token, which lies beside far larger features in one tensor.",
}
"""What is known of networks whose signal to noise is low, beside the figures."""
INTRODUCTION = """
# Which networks work

The smallest network of each of timm's families, torchvision's families and small networks of transformers, each
through the whole way: captured, quantized to W8A8 (`--recipe mse`, 8 images), written as ONNX, checked, and run in
ONNX Runtime under its default options. Nothing that was tried is left out. `python -m benchmarks.coverage` makes this
page, and goes on where it stopped: a row keeps the version that made it until it is made again, and networks that were
not tried yet, or whose file was not, are listed too.

Nothing is downloaded: weights are random and seeded, images are soft shapes. A random network is no trained one, but
its ranges can be like those of one: batch norms hold the statistics of such images, zeros of the initialisation are
filled, and weights too small to hand a signal on are scaled. Blocks of equal shape are cut to two, and images have 128
pixels where the network allows it. **These figures say that a network goes through and that the file computes what
was measured. They do not say how accurate the trained network is at 8 bits**: `bitwright quantize` measures that.

| column | meaning |
|---|---|
| side | pixels of an image's side |
| cut | repeated blocks that were taken out |
| seconds | of one core, for everything: Python, capture, calibration, export and check |
| memory | the largest of the whole process |
| unfolded | batch norms that stay operators of their own |
| SQNR | simulation against the float network, on 8 images that did not calibrate; the worst output |
| file | the file in ONNX Runtime, its optimisations on, against the simulation, in the same way |
| itself | the simulation against itself, its convolutions summed in another order: what no file can do better |
| same answers | images, or pixels, whose largest class is the same: file and simulation, simulation and itself |
"""


def main() -> None:
    """Runs what is asked for, one line of progress for each network, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="part of a network's name; may be repeated")
    parser.add_argument("--retry-failed", action="store_true", help="networks that were not done, again")
    parser.add_argument("--fresh", action="store_true", help="networks that are there already, again")
    parser.add_argument("--no-export", action="store_true", help="only capture and quantize, a third of the time")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for each network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(read(given.out))
    if not given.table:
        _run(_wanted(rows, given), rows, given)
    given.page.write_text(page(read(given.out)), encoding="utf-8")


def _wanted(rows: dict[str, Row], given: argparse.Namespace) -> list[str]:
    chosen = [n for n in coverage_networks.names() if not given.only or any(part in n for part in given.only)]
    if given.fresh:
        return chosen
    if given.no_export:
        return [n for n in chosen if n not in rows]
    again = {n for n, row in rows.items() if not done(row) and (given.retry_failed or "error" not in row)}
    return [n for n in chosen if n not in rows or n in again]


def _run(wanted: list[str], rows: dict[str, Row], given: argparse.Namespace) -> None:
    started = time.perf_counter()
    for count, row in enumerate(measured(wanted, given.limit, given.jobs, export=not given.no_export), 1):
        rows[row["network"]] = row
        _write(rows, given.out)
        spent = time.perf_counter() - started
        left = timedelta(seconds=round(spent / count * (len(wanted) - count)))
        print(f"{count}/{len(wanted)} {row['network']}: {_said(row)} ({row['seconds']:.0f} s; {left} left)", flush=True)


def _said(row: Row) -> str:
    if not done(row):
        return f"{row['stage']}: {row.get('error', 'not tried')}"
    return f"{row['sqnr']:.1f} dB, file {row['file_db']:.1f} dB, {row['agreement']}"


def done(row: Row) -> bool:
    """Whether the network's file was written and passed its check."""
    return "file_db" in row


def read(path: Path) -> Found:
    """What a file holds; nothing where there is none."""
    found: Found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def rows_of(found: Found) -> dict[str, Row]:
    """The rows by the names of their networks."""
    return {row["network"]: row for row in found.get("coverage", {}).get("results", [])}


def _write(rows: dict[str, Row], path: Path) -> None:
    found = {
        **where("torch", "timm", "torchvision", "transformers", "onnxruntime", "onnx"),
        "coverage": {
            "command": "python -m benchmarks.coverage",
            "what": "whether a network is captured, quantized to W8A8, exported and checked; seconds are of one core, "
            "ratios in decibels, 'varying' is the share of the output's power that changes from image to image, and "
            "'commit' the version that made a row",
            "results": list(rows.values()),
        },
    }
    fresh = path.with_name(f".{path.name}.partial")
    fresh.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


# ------------------------------------------------------------------------------------------- one network, one process


@dataclass(frozen=True)
class Trial:
    """A network in a process of its own, and the folder of that process."""

    name: str
    limit: float
    export: bool
    folder: tempfile.TemporaryDirectory[str]

    @property
    def stages(self) -> Path:
        """What the process says: a line of JSON for each stage, the last of which counts."""
        return Path(self.folder.name) / "stages"

    @property
    def errors(self) -> Path:
        """What libraries say."""
        return Path(self.folder.name) / "errors"


def measured(wanted: list[str], limit: float, jobs: int = 1, *, export: bool = True) -> Iterator[Row]:
    """The rows of networks as they come, each from a process that ends at its limit."""
    _import_libraries()
    waiting, running = wanted[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            trial = Trial(waiting.pop(), limit, export, tempfile.TemporaryDirectory())
            running[_forked(trial)] = trial
        process, status, usage = os.wait4(-1, 0)
        if process in running:
            yield _row(running.pop(process), os.waitstatus_to_exitcode(status), usage)


def _import_libraries() -> None:
    """Once, before processes are forked: half of the time of a small network, otherwise."""
    for name in LIBRARIES_OF_EXPORT:
        importlib.import_module(name)
    import_timm()
    torch.set_num_threads(1)


def _forked(trial: Trial) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        with trial.errors.open("w") as said:
            os.dup2(said.fileno(), 2)
        tempfile.tempdir = trial.folder.name
        _child(trial)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _child(trial: Trial) -> None:
    """Writes the row as far as it is known, stage by stage."""
    signal.setitimer(signal.ITIMER_PROF, trial.limit)  # ends the process; seconds of the core, whatever else runs there
    signal.alarm(round(PATIENCE * trial.limit) + 1)
    row: Row = {"network": trial.name, "commit": _commit(), "stage": "build"}
    with trial.stages.open("w") as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for stage, found in stages(trial.name):
                row |= found | {"stage": stage}
                print(json.dumps(row), file=said, flush=True)
                if stage == "export" and not trial.export:
                    return
        except Exception as error:
            print(json.dumps(row | _refused(error)), file=said, flush=True)


def _refused(error: Exception) -> Row:
    """The error in one line, and whether it is one of ours of one line, as any should be."""
    lines = str(error).strip().splitlines() or [""]
    ours = isinstance(error, BitwrightError)
    row: Row = {"error": lines[0] if ours else f"{type(error).__name__}: {lines[0]}", "lines": len(lines), "ours": ours}
    if any(f.name == "prepare_teacher" for f in traceback.extract_tb(error.__traceback__)):
        row["stage"] = "capture"
    return row


def _row(trial: Trial, code: int, usage: resource.struct_rusage) -> Row:
    """What the process wrote, and how it ended."""
    with trial.folder:
        lines = trial.stages.read_text().splitlines() if trial.stages.is_file() else []
        last_words = " ".join(trial.errors.read_text().splitlines()[-1:]) if trial.errors.is_file() else ""
    row: Row = json.loads(lines[-1]) if lines else {"network": trial.name, "stage": "build"}
    stopped = code == 0 and row["stage"] == "export" and not trial.export
    if "file_db" not in row and "error" not in row and not stopped:
        late = -code in {signal.SIGALRM, signal.SIGPROF}
        row["error"] = f"not finished in {trial.limit} s" if late else f"exit code {code} {last_words}".strip()
    row["seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    row["peak_memory_bytes"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return row


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def stages(name: str) -> Iterator[tuple[str, Row]]:
    """The stage that comes next, and what is known by then."""
    yield "build", {}
    subject = coverage_networks.build(name, 2 * IMAGES)
    facts = {"parameters": subject.parameters, "cut": subject.cut, "pixels": subject.images.shape[-1]}
    yield "quantize", facts
    network, (images, others) = subject.network, subject.images.split(IMAGES)
    model = bw.quantize(network, images, RECIPE, weights=8, activations=8, device="cpu")
    assert model.teacher is not None
    expected, found = _answers(model.teacher.graph, others), _answers(model.flat, others)
    if not all(bool(torch.isfinite(output).all()) for output in found):
        raise ArithmeticError("The quantized network answers values that are not finite.")
    sqnr = _ratio(expected, found)
    yield "export", {"sqnr": sqnr, "unfolded": len(model.result["unfolded"]), **_input_share(expected)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(path, others)
        in_file = _answers(_opened(path), others)
    yield (
        "done",
        {
            "file_db": _ratio(found, in_file),
            "agreement": _agreement(found, in_file),
            **_itself(model.flat, found, others),
        },
    )
    if sqnr < LOW:
        yield "done", {"why": _explained(network, model.teacher.graph, images, others, expected)}


def _answers(run: Run, images: Tensor) -> list[Tensor]:
    """The outputs of a network for images, in small batches."""
    with torch.no_grad():
        parts = [run(batch) for batch in images.split(IMAGES // 2)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def _itself(run: Run, found: list[Tensor], others: Tensor) -> Row:
    """How far the simulation is from itself when PyTorch sums in another order: what a file cannot be blamed for."""
    with torch.backends.mkldnn.flags(enabled=False):
        again = _answers(run, others)
    return {"itself_db": _ratio(found, again), "itself_agreement": _agreement(found, again)}


def _opened(path: Path) -> Run:
    """The file in ONNX Runtime under its default options."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = (i.name for i in session.get_inputs())
    return lambda batch: [torch.from_numpy(o) for o in session.run(None, {images: batch.numpy()})]


def _ratio(reference: list[Tensor], other: list[Tensor]) -> float:
    """Signal over noise of the worst output in decibels; :data:`SAME` if there is no noise."""
    found = []
    for a, b in zip(reference, other, strict=True):
        ratio = SignalToNoise()
        ratio.update(a, b)
        value = ratio.result()
        found.append(SAME if value is None else value)
    return round(min(found), 2)


def _agreement(reference: list[Tensor], other: list[Tensor]) -> float | None:
    """Share of images or pixels with the same class in the first output; None where it has no classes."""
    a, b = reference[0], other[0]
    if a.dim() not in {2, 4} or a.shape[1] < 2:
        return None
    return round(float((a.argmax(1) == b.argmax(1)).float().mean()), 4)


def _input_share(outputs: list[Tensor]) -> Row:
    """Which share of the first output's power changes from image to image; a dead network has none."""
    first = outputs[0].double()
    return {"varying": round(float((first - first.mean(0)).square().sum() / first.square().sum()), 6)}


def _explained(
    network: nn.Module, teacher: fx.GraphModule, images: Tensor, others: Tensor, expected: list[Tensor]
) -> Row:
    """What remains with activations of 16 bits, and what the float network keeps when its image alone is rounded."""
    step = float(others.max() - others.min()) / 255
    rounded = _answers(teacher, (others / step).round() * step)
    wide = bw.quantize(network, images, RECIPE, weights=8, activations=16, device="cpu")
    return {"image_db": _ratio(expected, rounded), "wide_db": _ratio(expected, _answers(wide.flat, others))}


# ----------------------------------------------------------------------------------------------------------- the page

HEADS = (
    "network", "side", "parameters", "cut", "seconds", "memory", "unfolded", "SQNR", "file", "itself",
    "same answers", "",
)  # fmt: skip
LIBRARIES = {
    "timm": "timm, the smallest network of each family",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
SAME = 200.0
CHAOTIC = 20.0
"""Decibels that a float network keeps when its image is rounded, below which its weights are to blame."""


def page(found: Found) -> str:
    """The page as Markdown: how many networks are done, then each with its figures, or why it is not."""
    known = rows_of(found)
    missing: list[Row] = [{"network": name} for name in coverage_networks.names() if name not in known]
    rows = sorted([*known.values(), *missing], key=_place)
    parts = [INTRODUCTION.strip(), _summary(rows)]
    if known:
        parts.append(_origin(found))
    for library, title in LIBRARIES.items():
        chosen = [row for row in rows if row["network"].startswith(f"{library}:")]
        if chosen:
            lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *map(_line, chosen)]
            parts += [f"## {title[0].upper()}{title[1:]}" if library != "timm" else f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _origin(found: Found) -> str:
    """Machine and versions; a row keeps the version that made it until it is made again."""
    commits = Counter(row["commit"] for row in rows_of(found).values() if row.get("commit"))
    versions = ", ".join(f"{count} rows by `{commit}`" for commit, count in commits.most_common())
    return f"Measured on {found['hardware']}, with {found['software']}: {versions}."


def _place(row: Row) -> int:
    known = coverage_networks.names()
    return known.index(row["network"]) if row["network"] in known else len(known)


def _summary(rows: list[Row]) -> str:
    lines = ["| | networks | tried | quantized | done |", "|---|---|---|---|---|"]
    for library in LIBRARIES:
        chosen = [row for row in rows if row["network"].startswith(f"{library}:")]
        tried = sum("stage" in row for row in chosen)
        quantized = sum("sqnr" in row for row in chosen)
        lines.append(f"| {library} | {len(chosen)} | {tried} | {quantized} | {sum(map(done, chosen))} |")
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = [f"`{row['network'].partition(':')[2]}`"]
    if "stage" not in row:
        return f"| {' | '.join([*cells, *[''] * (len(HEADS) - 2), 'not tried yet'])} |"
    cells += [str(row.get("pixels", "")), _millions(row.get("parameters")), str(row.get("cut", ""))]
    cells += [f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.1f} GB", str(row.get("unfolded", ""))]
    cells += [_decibels(row.get(key)) for key in ("sqnr", "file_db", "itself_db")]
    cells += [" / ".join(_percent(row.get(key)) for key in ("agreement", "itself_agreement")), note(row)]
    return f"| {' | '.join(cells)} |"


def note(row: Row) -> str:
    """Why a network is not done, or why its signal to noise is low; empty for the others."""
    if not done(row) and "error" not in row:
        return f"quantized; the file was not tried yet. {REASONS.get(row['network'], '')}".strip()
    if not done(row):
        reason = " ".join(row["error"].split()).replace("|", "\\|")
        return f"**not done** ({row['stage']}): {reason}"
    why = row.get("why")
    if why is None:
        return ""
    known = REASONS.get(row["network"], "")
    if why["image_db"] < CHAOTIC:
        cause = "Random weights: the float network keeps"
        return f"{cause} {why['image_db']:.0f} dB when the image alone is rounded to 8 bits. {known}".strip()
    return f"Activations: {why['wide_db']:.0f} dB with 16 bits for them. {known}".strip()


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _decibels(value: float | None) -> str:
    if value == SAME:
        return "equal"
    return "" if value is None else f"{value:.1f} dB"


if __name__ == "__main__":
    main()
