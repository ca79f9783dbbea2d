"""The folder that a run leaves behind: written as a whole or not at all.

Nothing here imports PyTorch before a network is written or read.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from bitwright.errors import UsageError, step
from bitwright.given.arguments import a_path
from bitwright.given.references import sha256_of
from bitwright.given.text import read_json
from bitwright.run import state as run_state
from bitwright.run.files import cannot_write, is_partial, remove, sweep, temporary, told_of, write_json
from bitwright.run.lock import BusyError, held
from bitwright.run.result import SCHEMA, RunResult
from bitwright.run.swap import interrupted, recover, swap

if TYPE_CHECKING:
    from bitwright.given.several import InputPart
    from bitwright.graph.student import Student

P = ParamSpec("P")
R = TypeVar("R")

MODEL, PLAN, RESULT, ONNX, LOG, STATE = (
    "model.safetensors", "plan.json", "result.json", "model.onnx", "log.jsonl", "state",
)  # fmt: skip
PAGE, FACTS, BENCH, PARITY = "report.html", "report.json", "bench.json", "parity.json"

PT2, TENSORRT, EXECUTORCH = "model.pt2", "model_tensorrt.onnx", "model.pte"
OPENVINO_FILES = ("model.xml", "model.bin")
TABLES = ("tables.json", "tables.npz")
ENCODINGS = ("model_float.onnx", "model_float.encodings")
DEPLOYED = (
    ONNX, f"{ONNX}.data", *OPENVINO_FILES, PT2, TENSORRT, f"{TENSORRT}.data", *TABLES, *ENCODINGS,
    f"{ENCODINGS[0]}.data", EXECUTORCH,
)  # fmt: skip
"""Files that `bitwright export` writes."""

RECORDS = frozenset({PLAN, RESULT, LOG, FACTS, BENCH, PARITY})
"""What a run says of itself."""
OURS = frozenset({MODEL, STATE, PAGE, *RECORDS, *DEPLOYED})

PATIENCE = 200
"""Hundredths of a second that a reader waits for the run that is being put in its place."""

CHECKED = (MODEL, *DEPLOYED)
"""Files whose sha256 stands in the result; the plan is there to be edited."""


def folder_name(model: str, recipe: str, bits: Mapping[str, int | str | None]) -> str:
    """Model, recipe and bits: the folder of a run that was not given one.

    Example:
        >>> folder_name("timm:resnet18@w.pt", "mse", {"weights": 4, "activations": 8})
        'resnet18-mse-w4a8'
    """
    name = re.sub(r"@.*", "", model).rpartition(":")[2] if ":" in model else Path(model).stem
    weights, activations = (b or "float" for b in bits.values())
    return re.sub(r"[^\w.-]+", "_", f"{name}-{Path(recipe).stem}-w{weights}a{activations}")


def check_target(folder: Path, *, force: bool = False, resume: bool = False) -> None:
    """Refuses a folder that cannot be written, before the long work starts.

    Raises:
        UsageError: it is a file, holds something already (what is no run, even with ``force``), or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected a folder at {folder}, found a file. Choose another folder=.")
    names = {p.name for p in folder.iterdir() if not is_partial(p)} if folder.is_dir() else set()
    unfinished = run_state.is_unfinished(folder / STATE)
    if unfinished and not force and not resume:
        raise UsageError(
            f"The folder {folder} is not empty: an unfinished run is in it{run_state.which_run(folder / STATE)}. "
            "Go on with --resume, or begin again with force=True."
        )
    if names - {STATE} and not force and not (resume and unfinished):
        if resume and RESULT in names:
            raise UsageError(f"The run in {folder} is finished: nothing is left to resume. force=True makes it again.")
        nothing = ", and no unfinished run is in it" if resume else ""
        raise UsageError(f"The folder {folder} is not empty{nothing}. Choose another folder=, or force=True.")
    foreign = sorted(names - OURS)
    if foreign:
        raise UsageError(
            f"Expected a run in {folder} for force=True to replace, found other files ({foreign[0]}). "
            "Choose another folder=."
        )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be written, and put in the place of what is there.

    Raises:
        UsageError: it cannot.
    """
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    for place in {parent, folder.parent if folder.exists() else parent}:
        _try_to_write(place, folder, "Choose another folder=.")


def check_takes_files(folder: Path) -> None:
    """Makes sure that a file can be put into a run, before what it will hold is measured.

    Raises:
        UsageError: it cannot.
    """
    _try_to_write(folder, folder, "Copy the run to a folder that can.")


def _try_to_write(place: Path, folder: Path, remedy: str) -> None:
    """Finds out by trying, because permissions do not tell all (read-only mounts, quotas, administrators)."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".bitwright", dir=place))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"The folder {folder} cannot be written ({reason}). {remedy}") from error


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside the target to write into; it takes the target's place when all went well.

    Raises:
        BitwrightError: it cannot be written; what was there is there still.
    """
    check_target(folder, force=True)
    folder = folder.resolve()
    partial = temporary(folder)
    try:
        with told_of(folder):
            partial.mkdir(parents=True)
            yield partial
            swap(partial, folder)
    finally:
        remove(partial)


@contextmanager
def writing(folder: Path) -> Iterator[str | None]:
    """Nobody else writes into the folder; what an interrupted replacement left is finished first, and said.

    Raises:
        UsageError: another process is at work there, or what it left cannot be moved.
    """
    with held(folder):
        yield finish_swap(folder.expanduser().resolve())


def exclusive(command: Callable[Concatenate[str, P], R]) -> Callable[Concatenate[str, P], R]:
    """A command on a run, which has the run's folder to itself."""

    @wraps(command)
    def locked(run: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        path = Path(run).expanduser()
        folder = path.parent if path.is_file() else path
        if not folder.is_dir() and not interrupted(folder.resolve()):
            return command(run, *args, **kwargs)
        with writing(folder) as said:
            if said is not None:
                warnings.warn(said, UserWarning, stacklevel=2)
            return command(run, *args, **kwargs)

    return locked


def settle(folder: Path) -> None:
    """Puts a run in its place whose replacement was interrupted, before it is read; a warning says so.

    Raises:
        UsageError: the run is not in its place and cannot be moved there.
    """
    folder = folder.expanduser().resolve()
    for _ in range(PATIENCE):
        if not interrupted(folder):
            return
        try:
            with writing(folder) as said:
                if said is not None:
                    warnings.warn(said, UserWarning, stacklevel=3)
            return
        except BusyError:
            if folder.exists():
                return  # somebody is replacing it at this moment; this is whole
            time.sleep(0.01)


def holds_run(path: Path) -> bool:
    """Whether it is a run folder, or the quantized network in one."""
    settle(path)
    return (path / MODEL).is_file() or (path.is_file() and path.suffix == ".safetensors")


def finish_swap(folder: Path) -> str | None:
    """Finishes or undoes an interrupted replacement, and removes what dead processes left; a line that says so.

    Raises:
        BitwrightError: the folder cannot be brought back.
    """
    try:
        said = recover(folder)
    except OSError as error:
        if folder.exists():
            return None
        raise cannot_write(folder, error) from error
    sweep(folder)
    return said


def write_files(model: Student, folder: Path) -> None:
    """Model, plan and sizes into an existing folder; ``result.json`` is written last by :func:`write_result`."""
    from bitwright.bits.plan import plan_of
    from bitwright.export.packed import ideal_bytes

    packed = write_model(model, folder)
    plan_of(model).write(folder / PLAN)
    model.result["size"] = {
        **model.result.get("size", {}),
        "ideal_bytes": ideal_bytes(model),
        "packed_bytes": packed,
    }


def write_model(model: Student, folder: Path) -> int:
    """``model.safetensors`` of a frozen network into an existing folder.

    Returns:
        Its bytes.
    """
    from bitwright.export.packed import save_packed
    from bitwright.given.preprocessing import Preprocessing

    settings = model.preprocessing.model_dump(mode="json") if isinstance(model.preprocessing, Preprocessing) else None
    extra = {"preprocessing": settings}
    names = {} if model.interface is None else {"interface": model.interface.stored()}
    names |= {"parts": {node: part.stored() for node, part in model.parts.items()}} if model.parts else {}
    save_packed(model, folder / MODEL, {**extra, **names})
    return (folder / MODEL).stat().st_size


def write_result(model: Student, folder: Path) -> None:
    """``result.json``, with the sha256 of the files beside it."""
    model.result["files"] = checksums(folder)
    write_json(folder / RESULT, model.result)


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of the model's files, by name; those that there are."""
    return {name: sha256_of(folder / name) for name in CHECKED if (folder / name).is_file()}


def renew_checksum(path: Path) -> None:
    """Puts a file that was written anew into the result beside it, if that lists files."""
    recorded = _recorded(path.parent)
    if path.name in recorded.get("files", {}):
        recorded["files"] |= checksums(path.parent)
        write_json(path.parent / RESULT, recorded)


def check_file(folder: Path, name: str, files: Mapping[str, str] | None, advice: str) -> None:
    """Compares a file with the sha256 that its run's result gives for it; runs of before have none.

    Raises:
        UsageError: it is missing or is not what was written; ``advice`` says what to do.
    """
    expected, path = (files or {}).get(name), folder / name
    if not path.is_file():
        raise UsageError(f"Expected {name} in {folder}, found none. {advice}")
    if expected is not None and sha256_of(path) != expected:
        raise UsageError(f"{path} is damaged or was changed: its sha256 is not the one in {RESULT}. {advice}")


def read_result(folder: str | Path) -> RunResult:
    """``result.json`` of a run folder, or the file itself.

    Raises:
        UsageError: there is none, the run is unfinished, it is cut short, or a newer bitwright wrote it.
    """
    path = Path(folder).expanduser()
    settle(path if path.suffix != ".json" else path.parent)
    file = path / RESULT if path.suffix != ".json" else path
    if not file.is_file():
        if not path.exists():
            raise UsageError(f"Expected a run folder, {path} does not exist. Check the path.")
        unfinished = (file.parent / STATE).is_dir()
        advice = "The run is unfinished: repeat its command with --resume." if unfinished else "Give a run's folder."
        raise UsageError(f"Expected {RESULT} in {path}, found none. {advice}")
    result = _parsed(file)
    if any(k not in result for k in ("model", "recipe", "layers", "size")):
        raise UsageError(f"Expected the result of a run in {file}, found something else. Give a run's folder.")
    schema = result.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UsageError(
            f"{file} was written by a newer bitwright (schema {schema}, this one reads up to {SCHEMA}). "
            "Update: pip install --upgrade bitwright."
        )
    return RunResult.read(result, file)


@step("Loading")
def load(folder: str | Path) -> Student:
    """The quantized model of a run folder (or of its ``model.safetensors``), bit for bit.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    from bitwright.export.packed import load_packed
    from bitwright.given.preprocessing import Preprocessing
    from bitwright.graph.outputs import Interface

    path = a_path("folder", folder)
    settle(path.parent if path.is_file() else path)
    if path.is_dir() and not (path / MODEL).is_file():
        raise _no_model(path)
    file = path / MODEL if path.is_dir() else path
    result = _recorded(file.parent) if file.name == MODEL else {}
    if file.is_file() and result:
        check_file(file.parent, MODEL, result.get("files"), "Copy the run again, or quantize again.")
    model, extra = load_packed(file)
    settings = extra.get("preprocessing")
    model.preprocessing = None if settings is None else Preprocessing(**settings)
    model.interface = Interface.read(extra.get("interface"))
    model.parts = _parts(extra.get("parts"))
    model.result = result or model.result
    return model


def _no_model(folder: Path) -> UsageError:
    unfinished = (folder / STATE).is_dir()
    advice = "It is unfinished: repeat its command with --resume." if unfinished else "Give a run's folder."
    return UsageError(f"Expected a run folder with {MODEL} in it, found none in {folder}. {advice}")


def _parts(stored: Any) -> dict[str, InputPart]:
    """Inputs of a network of several; none if something else is stored."""
    from bitwright.given.several import InputPart

    try:
        return {str(node): InputPart.read(part) for node, part in (stored or {}).items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _recorded(folder: Path) -> dict[str, Any]:
    """What ``result.json`` holds; nothing where there is none."""
    path = folder / RESULT
    if not path.is_file():
        return {}
    return _parsed(path)


def _parsed(file: Path) -> dict[str, Any]:
    """What a ``result.json`` holds."""
    try:
        result = read_json(file)
    except UsageError as error:
        raise UsageError(f"{error} It is damaged: quantize again.") from error
    if not isinstance(result, dict):
        raise UsageError(f"Expected the result of a run in {file}, found something else. Give a run's folder.")
    RunResult.read(result, file)
    return result


@contextmanager
def shown(folder: str | Path) -> Iterator[None]:
    """Around what makes a page or a table of a run's result, whatever somebody wrote into it.

    Raises:
        UsageError: a part of the result is missing or is something else than a run writes.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "something else than a run writes"
        raise UsageError(f"The result in {folder} is damaged: it has {what}. Quantize again.") from error
