"""`bitwright evaluate`: what a float network, a run or an ONNX file scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from rich.table import Table
from torch import Tensor

from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import EvaluateCall
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import (
    check_preprocess,
    decoder_of,
    float_network,
    images_at,
    is_run,
    known_settings,
    load_run,
    prepared_alike,
    with_regions,
)
from bitwright.errors import BitwrightError, DataError, ModelError, UsageError, one_line
from bitwright.given.images import Images
from bitwright.given.inputs import prepare_teacher
from bitwright.given.models import Model, load_model, preprocessing_of
from bitwright.given.named_boxes import named_boxes
from bitwright.given.preprocessing import has_channels_last
from bitwright.given.two_stages import IMAGE_INPUT, REGION_INPUT, TwoStages
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import Captured
from bitwright.graph.readings import Reading
from bitwright.graph.student import Student
from bitwright.measure.detection import BOX_FORMS
from bitwright.measure.evaluation import Network, Seconds, check_figures, compare, outputs_of, seconds_of
from bitwright.measure.metrics import Evaluation
from bitwright.measure.shown import metric_rows
from bitwright.measure.task import Outputs
from bitwright.measure.tasks import Scoring, task_of
from bitwright.onnx_in.build import unread_inputs
from bitwright.onnx_in.patterns import needed
from bitwright.onnx_in.tail import STORE, setting
from bitwright.run import folder as run_folder
from bitwright.run.record import EvaluatedImages
from bitwright.run.result import RunNetwork, RunResult
from bitwright.runtimes.onnxruntime import patient_options
from bitwright.runtimes.session import dtype_of
from bitwright.terminal import Terminal

BATCH = 50


class Evaluated(NamedTuple):
    """What is evaluated."""

    kind: str
    """``float``, ``run`` or ``onnx``."""
    network: Network
    reference: Network | None
    images: Images
    outputs: Outputs
    """How the outputs are read, by the reference's graph if there is one."""
    scoring: Scoring
    batch: int = BATCH
    seconds: Seconds | None = None
    """Of a detector of two stages."""


def evaluate(call: EvaluateCall, terminal: Terminal) -> None:
    """Scores a model on images, and shows the scores and why some are missing."""
    kind, images, found = _scored(call, terminal)
    about = {"model": {"name": call.model, "kind": kind}, "data": {"evaluation": asdict(images)}}
    terminal.result({**about, **found.to_dict(), "warnings": terminal.warnings})
    title = f"{call.model} on {images.count} images"
    terminal.show(_table(found, kind, title), *tables.fidelity_notes(found.outputs), *tables.scoring_notes(found))


def _scored(call: EvaluateCall, terminal: Terminal) -> tuple[str, EvaluatedImages, Evaluation]:
    """The kind of what was evaluated, the images, and what was measured.

    Raises:
        UsageError: there is nothing to compare with: no labels and no float network.
    """
    axes, _ = parse_classes(call.classes or []), call.compared.scoring
    terminal.begin("Loading")
    if Path(call.model).suffix == ".onnx":
        subject = _onnx(call, axes)
    elif is_run(call.model) or Path(call.model).expanduser().is_dir():
        subject = _run(call, axes)
    else:
        subject = _float(call, axes)
    terminal.finish()
    data = EvaluatedImages.of(subject.images)
    if not data.labelled and subject.reference is None:
        raise UsageError(
            "Expected labels to compare with, found none. "
            "Give --labels, class folders, or a float network with --float."
        )
    found = compare(
        subject.network,
        subject.reference,
        subject.images,
        outputs=subject.outputs,
        scoring=subject.scoring,
        batch=subject.batch,
        progress=terminal.progress,
        seconds=subject.seconds,
    )
    check_figures(found)
    if subject.kind == "float" and subject.reference is None:
        found = found.as_float()
    return subject.kind, data, found


def _images(call: EvaluateCall, network: Model | None) -> Images:
    images = images_at(call.images, network, call.reading, labels=call.labels, class_map=call.compared.class_map)
    return images if network is None else network.completed(images)


Axes = dict[str, int | None]


def parse_classes(given: list[str]) -> Axes:
    """Axes of classes by output.

    Raises:
        UsageError: one is no ``NAME=AXIS``.

    Example:
        >>> parse_classes(["map=3", "boxes=none"])
        {'map': 3, 'boxes': None}
    """
    found: Axes = {}
    for text in given:
        name, _, axis = text.rpartition("=")
        if not name or not (axis == "none" or axis.isdecimal()):
            raise UsageError(f"Expected --classes NAME=AXIS or NAME=none, found '{text}'. Such as --classes map=3.")
        found[name] = None if axis == "none" else int(axis)
    return found


def _run(call: EvaluateCall, axes: Axes) -> Evaluated:
    run = load_run(call.model)
    try:
        network = float_network(run, call.float_model, call.reading)
    except UsageError as error:
        if call.float_model is not None or run.preprocessing is None:
            raise
        scoring = _decoded(run, call.compared.scoring)
        images = with_regions(run, _images(call, Model(run, call.model, run.preprocessing)))
        _check_decoder(run, images, scoring)
        bare = images.truth is not None and images.truth.kind == "detection" and not (scoring.decode or scoring.beside)
        also = ", and nothing that makes boxes of outputs comes with it" if bare else ""
        warnings.warn(f"Fidelity to the float network is not measured{also}: {error}", stacklevel=2)
        return Evaluated("run", run.flat, None, images, outputs_of(run), scoring, seconds=seconds_of(run, None))
    images = _images(call, network)
    teacher = prepare_teacher(network, images, RunResult.read(run.result).model.output, result=run.result)
    run.attach_teacher(teacher)
    reference, readings = _reading(teacher, images, axes)
    outputs, scoring, seconds = outputs_of(run, readings), call.compared.beside(network), seconds_of(run, teacher)
    _check_decoder(run, images, scoring)
    return Evaluated("run", run.flat, reference, images, outputs, scoring, seconds=seconds)


def _float(call: EvaluateCall, axes: Axes) -> Evaluated:
    preprocessing = call.reading.preprocessing
    network = load_model(call.model, **preprocessing)
    images = _images(call, network)
    captured = prepare_teacher(network, images, call.output)
    own, readings = _reading(captured, images, axes)
    scoring = call.compared.beside(network)
    if call.float_model is None:
        outputs, seconds = outputs_of(captured, readings), seconds_of(captured, None)
        return Evaluated("float", own, None, images, outputs, scoring, seconds=seconds)
    other = prepare_teacher(load_model(call.float_model, **preprocessing), images, call.output)
    reference, readings = _reading(other, images, axes)
    outputs, seconds = outputs_of(captured, readings), seconds_of(captured, other)
    return Evaluated("float", own, reference, images, outputs, scoring, seconds=seconds)


def _reading(captured: Captured, images: Images, axes: Axes) -> tuple[Network, Sequence[Reading]]:
    """The float network as a function, and how its outputs are read."""
    readings = read_outputs(captured.graph, images.batch(range(min(2, len(images)))), captured.outputs, axes)
    return captured.flat, readings


def _onnx(call: EvaluateCall, axes: Axes) -> Evaluated:
    path = Path(call.model).expanduser()
    if path.name == run_folder.ONNX and (path.parent / run_folder.RESULT).is_file():
        files = run_folder.read_result(path.parent).files
        advice = f"Write it with: {words.typed('bitwright', 'export', path.parent)}"
        run_folder.check_file(path.parent, run_folder.ONNX, files, advice)
    session, about = _session(path), _network_beside(path)
    check_preprocess(about.settings, call.reading)
    network = _named_float(call, about)
    if {i.name for i in session.get_inputs()} == {IMAGE_INPUT, REGION_INPUT}:
        return _two_stages(call, session, axes, about, network)
    given, beside = _apart(session.get_inputs())
    if given is not None and network is not None and (wanted := _inside(path, session, network)):
        session, beside = _session_of(path, given.name, wanted), []
    if given is None or (beside and Path(call.images).suffix == ".npz"):
        return _several(call, session, axes, about, network)
    if len(given.shape) < 2:
        raise ModelError(f"Expected one image input [N, C, H, W] in {call.model}, found {_inputs(session)}.")
    images = _images(call, network or _file_alone(path, about, given, call.reading))
    shape = tuple(images[0].shape)
    if not _fits(shape, given.shape[1:]):
        raise UsageError(
            f"Expected images of {_by(given.shape[1:])} for {call.model}, found {_by(shape)}. Give --input-size."
        )
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None
    unread = unread_inputs(onnx.load(path, load_external_data=False).graph) if beside else []
    settings = {each.name: 0 if each.name in unread else _setting(each, shape, call) for each in beside}

    def whole(x: Tensor) -> list[Tensor]:
        feed = {given.name: _fed(x, given)}
        feed |= {each.name: np.full(_sides(each, len(x)), settings[each.name], dtype_of(each.type)) for each in beside}
        return [torch.from_numpy(np.asarray(o)) for o in session.run(None, feed)]

    def run(x: Tensor) -> list[Tensor]:
        missing = (fixed or len(x)) - len(x)
        padded = torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x
        return [o[: len(x)] if missing and first and o.dim() else o for o in whole(padded)]

    first = _has_images_first(session, whole, given, images)
    at_once = (fixed or BATCH) if first else 1
    return _in_runtime(call, axes, session, run, images, network, about, at_once, fixed if not first else None)


def _apart(inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The image input of a file, None where it takes others, and what it takes beside it, such as sizes of photos."""
    images = [each for each in inputs if len(each.shape) == 4] if len(inputs) > 1 else list(inputs)
    beside = [each for each in inputs if each not in images]
    alone = len(images) == 1 and all(len(each.shape) <= 2 for each in beside)
    return (images[0], beside) if alone else (None, beside)


def _setting(each: Any, image: Sequence[int], call: EvaluateCall) -> int:
    """What a file gets beside images of a shape.

    Raises:
        UsageError: nobody knows.
    """
    last = has_channels_last(tuple(image))
    value = setting(each.name, _sides(each, 0), set(image[:2] if last else image[1:]))
    if value is None:
        raise UsageError(
            f"Expected inputs beside the images that are their size or a scale, found {each.name} [{_by(each.shape)}] "
            f"in {call.model}. {STORE}"
        )
    return value


def _sides(each: Any, count: int) -> list[int]:
    """The shape of an input for a number of images."""
    return [side if isinstance(side, int) else count for side in each.shape]


def _fed(x: Tensor, given: Any) -> Any:
    """A tensor in the numbers that an input of a file takes; files of whole numbers take pixels."""
    kind = np.dtype(dtype_of(given.type))
    return (x if kind.kind == "f" else x.round()).numpy().astype(kind, copy=False)


def _has_images_first(session: Any, run: Network, given: Any, images: Images) -> bool:
    """Whether all outputs of a file have the axis of images first, where it takes more than one at once.

    Where the file calls a first axis by another name, two images tell, or as many as it takes: what suppresses boxes
    gives as many as it kept.
    """
    axis = given.shape[0]
    count = axis if isinstance(axis, int) else 2
    alone = len(images) < 2 and count != axis
    if count == 1 or alone or all(o.shape and o.shape[0] == axis for o in session.get_outputs()):
        return True
    try:
        return all(o.dim() and len(o) == count for o in run(images.batch([k % len(images) for k in range(count)])))
    except Exception:  # of the runtime, which runs one image, or says more of it than of two
        return False


def _several(call: EvaluateCall, session: Any, axes: Axes, about: RunNetwork, network: Model | None) -> Evaluated:
    """A file of several inputs, which the images hold by name."""
    stand_in: Any = SimpleNamespace(input_names=[i.name for i in session.get_inputs()])
    images = _images(call, network or Model(stand_in, "", None))
    wanted = {i.name: tuple(i.shape[1:]) for i in session.get_inputs()}
    found = {part.name: part.shape for part in images.parts}
    if wanted.keys() != found.keys() or not all(_fits(found[name], shape) for name, shape in wanted.items()):
        said = ", ".join(f"{name} [{_by(shape)}]" for name, shape in found.items()) or "images alone"
        raise UsageError(
            f"Expected inputs {_inputs(session)}, found {said} in {call.images}. Give an .npz file with an array of "
            "floats for each."
        )

    return _in_runtime(call, axes, session, _by_name(session, images), images, network, about, BATCH)


def _by_name(session: Any, images: Images) -> Network:
    """A file of several inputs, called with the tensor that holds them."""
    inputs = {each.name: each for each in session.get_inputs()}
    return lambda x: [
        torch.from_numpy(o) for o in session.run(None, {p.name: _fed(p.of(x), inputs[p.name]) for p in images.parts})
    ]


def _two_stages(call: EvaluateCall, session: Any, axes: Axes, about: RunNetwork, network: Model | None) -> Evaluated:
    """A detector of two stages, whose file holds both networks side by side."""
    path = Path(call.model).expanduser()
    given, names = {i.name: i for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    images = _images(call, network or _file_alone(path, about, given[IMAGE_INPUT], call.reading))
    first, second = (_part_of(path, *ends) for ends in ((IMAGE_INPUT, names[:-2]), (REGION_INPUT, names[-2:])))
    between = _of_run_beside(path, tuple(names), call.compared.scoring)[1].beside
    if isinstance(between, TwoStages):
        images = between.completed(images, lambda x: dict(zip(names, first(x), strict=False)))
    if not images.parts:
        raise UsageError(
            f"Expected to know what runs between the two networks of {call.model}, found no run of a detector by name "
            "beside it. Give the detector with --float."
        )
    found = _in_runtime(call, axes, session, _by_name(session, images), images, network, about, BATCH)
    reference = None if network is None else seconds_of(prepare_teacher(network, images, call.output), None)
    return found._replace(seconds=(second, None if reference is None else reference[0]))


def _session_of(path: Path, given: str, outputs: Sequence[str]) -> Any:
    """The part of a file that computes tensors of one of its inputs."""
    import onnxruntime

    program = onnx.load(path)
    graph = program.graph
    nodes, inputs = needed(graph.node, outputs), [value for value in graph.input if value.name == given]
    for field, kept in ((graph.node, nodes), (graph.input, inputs), (graph.output, [])):
        del field[:]
        field.extend(kept)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return onnxruntime.InferenceSession(
        program.SerializeToString(), patient_options(), providers=["CPUExecutionProvider"]
    )


def _inside(path: Path, session: Any, network: Model) -> tuple[str, ...]:
    """The tensors that a float network from another file ends in, where the file has operators behind them.

    Raises:
        UsageError: the file does not have them.
    """
    wanted = () if network.source is None or network.decode is None else network.source.network.outputs
    if set(wanted) <= {o.name for o in session.get_outputs()}:
        return ()
    made = {name for node in onnx.load(path, load_external_data=False).graph.node for name in node.output}
    if not set(wanted) <= made:
        raise UsageError(
            f"Expected tensors {', '.join(wanted)} in {path}, in which the network of --float ends, found none of some "
            "of these names. Evaluate both files without --float."
        )
    return wanted


def _part_of(path: Path, given: str, outputs: list[str]) -> Network:
    """What a file computes of one of its inputs."""
    session = _session_of(path, given, outputs)
    return lambda x: [torch.from_numpy(o) for o in session.run(None, {given: x.numpy()})]


def _in_runtime(
    call: EvaluateCall,
    axes: Axes,
    session: Any,
    run: Network,
    images: Images,
    network: Model | None,
    about: RunNetwork,
    batch: int,
    copies: int | None = None,
) -> Evaluated:
    """A file, beside the float network if there is one; it takes one image as so many copies, if it takes no fewer."""
    names = tuple(o.name for o in session.get_outputs())
    if network is None:
        outputs, scoring = _of_run_beside(Path(call.model).expanduser(), names, call.compared.scoring)
        if scoring.beside is None:
            scoring = replace(scoring, beside=BoxesOfFile(names, batch, copies or 1))
        return Evaluated("onnx", run, None, images, outputs, scoring, batch)
    teacher = prepare_teacher(network, images, call.output or about.output)
    reference, readings = _reading(teacher, images, axes)
    outputs, scoring = outputs_of(teacher, readings), call.compared.beside(network)
    run = _of_names(run, names, () if network.source is None else network.source.network.outputs)
    return Evaluated("onnx", run, reference, images, outputs, scoring, batch)


@dataclass(frozen=True)
class BoxesOfFile:
    """Boxes that a whole file gives.

    Attributes:
        names: of its outputs.
        batch: images that it is given at once, or fewer where it takes any number.
        copies: of one image, where it takes no fewer and its outputs do not have the axis of images first.
    """

    names: Sequence[str]
    batch: int
    copies: int = 1

    def __call__(self, outputs: Any) -> list[Any]:
        """Boxes of each image, as ``decode=`` returns them.

        Raises:
            DataError: the outputs are none.
        """
        flat = list(outputs.values()) if isinstance(outputs, dict) else outputs
        flat = [flat] if isinstance(flat, Tensor) else flat
        answer = dict(zip(self.names, flat, strict=True))
        count = self.copies if self.batch == 1 or not flat[0].dim() else len(flat[0])
        found = named_boxes(answer, count, alone=True)
        if found is None:
            said = ", ".join(f"{name} {tuple(value.shape)}" for name, value in answer.items())
            raise DataError(
                f"Expected boxes from the file to compare with labels, found {said}. Give --decode with a function of "
                f"its outputs that returns {BOX_FORMS}."
            )
        return found[:1] if self.copies > 1 else found


def _of_names(run: Network, names: Sequence[str], wanted: Sequence[str]) -> Network:
    """A file without the outputs that are an input or stored, where it has the wanted ones; else as it is."""
    if not wanted or not set(wanted) <= set(names):
        return run
    places = [names.index(name) for name in wanted]

    def chosen(x: Tensor) -> list[Tensor]:
        found = run(x)
        return [found[k] for k in places]

    return chosen


def _of_run_beside(path: Path, names: tuple[str, ...], scoring: Scoring) -> tuple[Outputs, Scoring]:
    """How outputs are arranged, as the run that the file lies in knows, and what decodes those of a zoo network."""
    if path.name != run_folder.ONNX or not (path.parent / run_folder.MODEL).is_file():
        return Outputs(names), scoring
    run = run_folder.load(path.parent)
    if run.outputs != names:
        return Outputs(names), scoring
    return outputs_of(run), _decoded(run, scoring)


def _decoded(run: Student, scoring: Scoring) -> Scoring:
    """What decodes the outputs of a run whose float network is not asked for."""
    return replace(scoring, beside=decoder_of(run))


def _check_decoder(run: Student, images: Images, scoring: Scoring) -> None:
    """The user's function that decoded outputs of a run is code, which runs only where the user names it.

    Raises:
        UsageError: boxes or maps are to be compared, and it is not named.
    """
    loss = RunResult.read(run.result).loss
    task = task_of(images, scoring.task)
    if loss is None or loss.decode is None or task is None or task.name != loss.task or scoring.decoder(task):
        return
    raise UsageError(
        f"The outputs of this run were decoded by {loss.decode}, Python code which runs only where you name it. "
        f"Give {words.typed('--decode', loss.decode)} if you trust it."
    )


def _session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ModelError(f"Expected an ONNX file, {path} does not exist. Check the path.")
    options = patient_options()
    options.log_severity_level = 4  # what it cannot do is said here
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot load {path} ({one_line(str(error))[:200]}). Export it again.") from error


def _inputs(session: Any) -> str:
    return ", ".join(f"{i.name} [{_by(i.shape)}]" for i in session.get_inputs())


def _fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether sides are those that a file fixes."""
    pairs = zip(shape, wanted, strict=True) if len(shape) == len(wanted) else [(0, 1)]
    return all(not isinstance(side, int) or side == ours for ours, side in pairs)


def _by(shape: Any) -> str:
    return "x".join(map(str, shape))


def _network_beside(path: Path) -> RunNetwork:
    """What the run folder that an ONNX file lies in says of the network; nothing where it lies in none."""
    result = path.parent / run_folder.RESULT
    try:
        return run_folder.read_result(result).model if result.is_file() else RunNetwork("")
    except UsageError:
        return RunNetwork("")


def _named_float(call: EvaluateCall, about: RunNetwork) -> Model | None:
    """The float network of ``--float``, with the preprocessing of the run unless another is said."""
    if call.float_model is None:
        return None
    settings = call.reading.preprocessing
    network = load_model(call.float_model, **(settings or known_settings(about.settings)))
    how = None if about.preprocessing is None else preprocessing_of(about.preprocessing, {})
    return prepared_alike(network, how, call.reading)


def _file_alone(path: Path, about: RunNetwork, given: Any, reading: ImageOptions) -> Model | None:
    """An ONNX file as a network: with the preprocessing given, else the one recorded in its run folder.

    Whole numbers are pixels from 0 to 255, as where the file is read.
    """
    base, settings = dict(about.preprocessing or {}), reading.preprocessing
    sides = tuple(given.shape[1:])
    if not base and len(sides) == 3 and np.dtype(dtype_of(given.type)).kind in "iu":
        base["std"] = 1 / 255
    if not base and not settings:
        return None
    last = all(isinstance(side, int) for side in sides) and has_channels_last(sides)
    if "input_size" not in settings and "input_size" not in base:
        base["input_size"] = "x".join(map(str, (sides[2], *sides[:2]) if last else sides))
    base |= {"layout": "channels_last"} if last else {}
    try:
        how = preprocessing_of(base, settings)
    except (BitwrightError, TypeError) as error:
        raise UsageError(f"The preprocessing of {path}: {error}") from error
    return Model(torch.nn.Identity(), path.stem, how)


def _table(found: Evaluation, kind: str, title: str) -> Table:
    rows = metric_rows(found)
    if found.quantized is None:
        made = tables.table("", ">float", title=title)
        for what, theirs, _ in rows:
            made.add_row(what, theirs)
        return made
    ours = {"run": "quantized", "onnx": "in ONNX Runtime", "float": "this network"}[kind]
    made = tables.table("", ">float", f">{ours}", title=title)
    for row in rows:
        made.add_row(*row)
    return made
