"""Studies: a paper's analysis, repeated on any network. One file a study, which holds it in ``STUDY``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright import zoo
from bitwright.errors import UsageError
from bitwright.given.arguments import nearest, of_kind
from bitwright.given.images import Images, load_images
from bitwright.given.inputs import as_model, find_device
from bitwright.given.models import Model, load_model
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing
from bitwright.given.several import input_names
from bitwright.graph.devices import undisturbed
from bitwright.memory import keep_pages
from bitwright.progress import Progress, watched
from bitwright.recipes import Recipe
from bitwright.recipes import recipe as find_recipe
from bitwright.run.about import environment, peak_memory_bytes
from bitwright.studies.base import KeptRows, Study, StudyResult, StudySettings, settings_facts
from bitwright.studies.rows import Row, plain
from bitwright.studies.subject import Subject, split

__all__ = ["Study", "StudyResult", "StudySettings", "builtin_studies", "find_study", "study"]

ZOO_IMAGES = "zoo:fashion"


@cache
def builtin_studies() -> dict[str, Study]:
    """Every study in this folder, by name: each module holds one in ``STUDY``."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        made = getattr(importlib.import_module(f"{__name__}.{info.name}"), "STUDY", None)
        if made is not None:
            found[made.name] = made
    return found


def find_study(name: str, *, as_published: bool = False) -> Study:
    """A study by name.

    Args:
        name: of the study.
        as_published: the one that repeats the paper's own start and settings instead.

    Raises:
        UsageError: there is none of that name, and the nearest is named; or it has no such form.
    """
    of_kind("name", name, str, "the name of a study")
    known = builtin_studies()
    if name not in known:
        raise UsageError(f"There is no study '{name}'.{nearest(name, known)} All: {', '.join(known)}.")
    found = known[name].published if as_published else known[name]
    if found is None:
        there = ", ".join(each.name for each in known.values() if each.published)
        raise UsageError(f"Study '{name}' has no use for as_published=; {there} has. Leave it out.")
    return found


@undisturbed()
def study(
    name: str,
    model: nn.Module | torch.export.ExportedProgram | Model | str | Path | None = None,
    images: Any = None,
    *,
    steps: int | None = None,
    weights: int | str | Sequence[int] | None = None,
    activations: int | str | None = None,
    seeds: Sequence[int] | None = None,
    samples: int | None = None,
    recipe: str | None = None,
    as_published: bool = False,
    evaluate: Any = None,
    labels: Any = None,
    device: str = "auto",
    preprocessing: Preprocessing | PreprocessFunction | None = None,
    output: str | None = None,
    input_key: str | None = None,
    skip_unreadable: bool = False,
    progress: Progress | bool = True,
    kept: Path | None = None,
    resume: bool = False,
) -> StudyResult:
    """Repeats a paper's analysis on a network, or on the embedded ones.

    Args:
        name: of the study; see :func:`builtin_studies`.
        model: as for :func:`bitwright.quantize`; the two embedded networks (and one more in ``lfh``) if not given.
        images: to calibrate on, as everywhere; given exactly if ``model`` is.
        steps: of each optimisation; the study's default if not given, as with the next four.
        weights: bits, 2 to 8; several as ``(3, 4)`` or ``"3,4"``.
        activations: bits, 2 to 8 or 16, or ``"float"``.
        seeds: of all random choices; means and spreads are over these.
        samples: images to calibrate on; the most, where their number is studied.
        recipe: by name or file, for a study that can take any.
        as_published: the paper's own start and settings, in ``search``.
        evaluate: images to measure on; every fourth of ``images``, which is not calibrated on then, if not given.
        labels: a CSV of ``file,class_index``, if the images to measure on do not carry their own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        preprocessing: of image files; a named model brings its own.
        output: name of the one output to keep, for a model that returns several.
        input_key: which of several entries the images are; see :func:`bitwright.load_images`.
        skip_unreadable: go on when a file cannot be decoded.
        progress: as for :func:`bitwright.quantize`.
        kept: file for the rows of an unfinished study.
        resume: take the rows over that it holds.

    Returns:
        Rows, summary and figure; ``.save(folder)`` writes NAME.json and NAME.html.

    Raises:
        UsageError: an argument, a file, or the model cannot be used; one line says why.
    """
    started = time.perf_counter()
    chosen = find_study(name, as_published=as_published)
    settings = chosen.settle(
        steps=steps, weights=weights, activations=activations, seeds=seeds, samples=samples, recipe=recipe
    )
    method = find_recipe(settings.recipe or chosen.recipe)
    _check_together(model, images, evaluate, labels)
    where = find_device(device)
    subjects = []
    with watched(progress) as told:
        for network in _networks(chosen, told) if model is None else [as_model(model, preprocessing)]:
            told(f"Capturing {network.name}", 0, 0)
            reading = {"inputs": input_names(network.module), "input_key": input_key}
            pool, held_out = _parts(images, evaluate, labels, network, {**reading, "skip_unreadable": skip_unreadable})
            subjects.append(Subject(network, pool, held_out, where, output))
        _warn_of_few(samples, subjects)
        facts = _facts(chosen, settings, method, subjects, where)
        identity = json.dumps([facts[k] for k in ("bitwright", "settings", "recipe", "networks")], sort_keys=True)
        rows = KeptRows(kept, identity, resume=resume)
        for subject, about in zip(subjects, facts["networks"], strict=True):
            about["float"] = subject.float_accuracy(told)
        measured = _measure(chosen, subjects, settings, rows, told)
    facts["seconds"] = {"total": round(time.perf_counter() - started, 3)}
    return StudyResult(chosen, {**facts, "peak_memory_bytes": peak_memory_bytes(), "warnings": []}, measured)


def _check_together(model: Any, images: Any, evaluate: Any, labels: Any) -> None:
    if (model is None) != (images is None):
        raise UsageError("Expected MODEL and IMAGES, or neither to run on the embedded networks, found one of them.")
    if labels is not None and evaluate is None:
        raise UsageError("Labels are used for evaluation only. Give the images they belong to with evaluate=.")


def _facts(
    chosen: Study, settings: StudySettings, method: Recipe, subjects: Sequence[Subject], where: torch.device
) -> dict[str, Any]:
    """What a result says of the study's circumstances."""
    return {
        **environment(where, settings.seeds[0]),
        "settings": settings_facts(chosen, settings),
        "recipe": None if settings.steps is None else method.settings(),
        "networks": [s.facts() for s in subjects],
    }


def _parts(
    images: Any, evaluate: Any, labels: Any, network: Model, reading: Mapping[str, Any]
) -> tuple[Images, Images]:
    """Images to calibrate and to measure on: one part and the other of the same ones where no others are given."""
    calibration = _images(ZOO_IMAGES if images is None else images, network, None, reading)
    if evaluate is None:
        return split(calibration)
    return calibration, _images(evaluate, network, labels, reading)


def _networks(chosen: Study, progress: Progress) -> list[Model]:
    if chosen.networks is not None:
        return chosen.networks(progress)
    return [load_model(f"zoo:{name}") for name in zoo.NETWORKS]


def _warn_of_few(samples: int | None, subjects: list[Subject]) -> None:
    fewest = min(len(s.pool) for s in subjects)
    if samples is not None and samples > fewest:
        text = f"{samples} images were asked for, there are {fewest} to calibrate on; all are used."
        warnings.warn(text, UserWarning, stacklevel=3)


def _images(source: Any, network: Model, labels: Any, reading: Mapping[str, Any]) -> Images:
    images = load_images(source, network.preprocessing, labels=labels, channels_last=network.channels_last, **reading)
    if isinstance(source, str | Path) and not reading["skip_unreadable"]:
        images.check()
    return images


def _measure(
    chosen: Study, subjects: list[Subject], settings: StudySettings, kept: KeptRows, progress: Progress
) -> list[Row]:
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


def _within(progress: Progress, name: str, position: int, cells: int, key: Row) -> Progress:
    """Progress of a cell as a detail of the study's."""
    told = ", ".join(f"seed {v}" if k == "seed" else str(v) for k, v in key.items() if k not in _ALIKE)

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        inner = f"{what} {done}/{total}" if total else what
        progress(f"Studying {name}", position, cells, f"{told}: {inner}")

    return report


_ALIKE = ("activations",)
