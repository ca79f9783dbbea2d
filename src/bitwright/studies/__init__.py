"""Studies: a paper's analysis, repeated on any network. One file a study, which holds it in ``STUDY``."""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright import zoo
from bitwright.api import as_model, find_device
from bitwright.data import Images, load_images
from bitwright.errors import UsageError
from bitwright.memory import keep_pages
from bitwright.models import Model, load_model
from bitwright.preprocessing import PreprocessFunction, Preprocessing
from bitwright.result import environment, peak_memory_bytes
from bitwright.stages.base import Progress, silent
from bitwright.studies.base import Kept, Result, Row, Settings, Study, plain, settings_facts
from bitwright.studies.subject import Subject, split

__all__ = ["Result", "Settings", "Study", "builtin", "find", "study"]

ZOO_IMAGES = "zoo:fashion"


@cache
def builtin() -> dict[str, Study]:
    """Every study in this folder, by name: each module holds one in ``STUDY``."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        made = getattr(importlib.import_module(f"{__name__}.{info.name}"), "STUDY", None)
        if made is not None:
            found[made.name] = made
    return found


def find(name: str) -> Study:
    """A study by name.

    Raises:
        UsageError: there is none of that name; the nearest is named.
    """
    known = builtin()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
        raise UsageError(f"There is no study '{name}'. Did you mean '{near[0]}'? All: {', '.join(known)}.")
    return known[name]


def study(
    name: str,
    model: nn.Module | torch.export.ExportedProgram | Model | str | None = None,
    images: Any = None,
    *,
    steps: int | None = None,
    weights: int | str | Sequence[int] | None = None,
    activations: int | str | None = None,
    seeds: Sequence[int] | None = None,
    samples: int | None = None,
    evaluate: Any = None,
    labels: Any = None,
    device: str = "auto",
    preprocessing: Preprocessing | PreprocessFunction | None = None,
    output: str | None = None,
    progress: Progress = silent,
    kept: Path | None = None,
    resume: bool = False,
) -> Result:
    """Repeats a paper's analysis on a network, or on the embedded ones.

    Args:
        name: of the study; see :func:`builtin`.
        model: as for :func:`bitwright.quantize`; the two embedded networks (and one more in ``lfh``) if not given.
        images: to calibrate on, as everywhere; given exactly if ``model`` is.
        steps: of each optimisation; the study's default if not given, as with the next four.
        weights: bits, 2 to 8; several as ``(3, 4)`` or ``"3,4"``.
        activations: bits, 2 to 8 or 16, or ``"float"``.
        seeds: of everything random; means and spreads are over these.
        samples: images to calibrate on; the most, where their number is studied.
        evaluate: images to measure on; every fourth of ``images``, which is not calibrated on then, if not given.
        labels: a CSV of ``file,class_index``, if the images to measure on do not carry their own.
        device: ``auto``, ``cpu`` or ``cuda``.
        preprocessing: of image files; a named model brings its own.
        output: name of the one output to keep, for a model that returns several.
        progress: called as ``progress(what, done, total, detail)``.
        kept: file for the rows of an unfinished study.
        resume: take the rows over that it holds.

    Returns:
        Rows, summary and figure; ``.save(folder)`` writes NAME.json and NAME.html.

    Raises:
        UsageError: an argument, a file, or the model cannot be used; one line says why.
    """
    started = time.perf_counter()
    chosen = find(name)
    settings = chosen.settle(steps=steps, weights=weights, activations=activations, seeds=seeds, samples=samples)
    if (model is None) != (images is None):
        raise UsageError("Expected MODEL and IMAGES, or neither to run on the embedded networks, found one of them.")
    networks = _networks(chosen, progress) if model is None else [as_model(model, preprocessing)]
    where = find_device(device)
    source = ZOO_IMAGES if images is None else images
    subjects = [_subject(n, source, evaluate, labels, where, output, settings, progress) for n in networks]
    facts: dict[str, Any] = {
        **environment(where, settings.seeds[0]),
        "settings": settings_facts(chosen, settings),
        "networks": [s.facts() for s in subjects],
    }
    identity = json.dumps([facts[k] for k in ("bitwright", "settings", "networks")], sort_keys=True)
    rows = _measure(chosen, subjects, settings, Kept(kept, identity, resume=resume), progress)
    for subject, about in zip(subjects, facts["networks"], strict=True):
        about["float"] = subject.float_accuracy(progress)
    facts["seconds"] = {"total": round(time.perf_counter() - started, 3)}
    facts["peak_memory_bytes"] = peak_memory_bytes()
    facts["warnings"] = []
    return Result(chosen, facts, rows)


def _networks(chosen: Study, progress: Progress) -> list[Model]:
    if chosen.networks is not None:
        return chosen.networks(progress)
    return [load_model(f"zoo:{name}") for name in zoo.NETWORKS]


def _subject(
    network: Model,
    source: Any,
    evaluate: Any,
    labels: Any,
    device: torch.device,
    output: str | None,
    settings: Settings,
    progress: Progress,
) -> Subject:
    progress(f"Capturing {network.name}", 0, 0)
    images = _images(source, network)
    if evaluate is None:
        if labels is not None:
            raise UsageError("Labels are used for evaluation only. Give the images they belong to with --evaluate.")
        pool, held_out = split(images)
    else:
        pool, held_out = images, _images(evaluate, network, labels)
    if settings.samples > len(pool) and source is not ZOO_IMAGES:
        warnings.warn(
            f"{settings.samples} images were asked for, there are {len(pool)} to calibrate on; all are used.",
            UserWarning,
            stacklevel=3,
        )
    return Subject(network, pool, held_out, device, output)


def _images(source: Any, network: Model, labels: Any = None) -> Images:
    return load_images(source, network.preprocessing, labels=labels)


def _measure(chosen: Study, subjects: list[Subject], settings: Settings, kept: Kept, progress: Progress) -> list[Row]:
    """All cells of all networks, those that were kept without measuring them again."""
    rows = []
    with keep_pages():
        for subject in subjects:
            cells = list(chosen.cells(subject, settings))
            for position, cell in enumerate(cells):
                key = {"network": subject.name, **cell.key}
                row = kept.get(key)
                if row is None:
                    begun = time.perf_counter()
                    found = cell.measure(_within(progress, subject.name, position, len(cells), cell.key))
                    row = plain({**key, **found, "seconds": round(time.perf_counter() - begun, 3)})
                    kept.add(key, row)
                rows.append(row)
                progress(f"Studying {subject.name}", position + 1, len(cells))
    return rows


def _within(progress: Progress, name: str, position: int, total: int, key: Row) -> Progress:
    """Progress of a cell as a detail of the study's."""
    told = ", ".join(f"seed {v}" if k == "seed" else str(v) for k, v in key.items() if k not in _ALIKE)

    def report(what: str, done: int, of: int, detail: str = "") -> None:
        inner = f"{what} {done}/{of}" if of else what
        progress(f"Studying {name}", position, total, f"{told}: {inner}")

    return report


_ALIKE = ("activations",)
