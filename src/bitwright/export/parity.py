"""Does the exported file compute what was measured? Asked of the runtime itself, on real images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from bitwright.errors import BitwrightError, ParityError, UsageError, one_line
from bitwright.export.arbiter import compare_kernels
from bitwright.export.deviation import Forward, output_parities, tipped
from bitwright.export.forms import keep_in_float
from bitwright.export.frame import framed
from bitwright.export.functions import DOMAIN
from bitwright.export.layers import activation_quantizers, compare_layers
from bitwright.export.onnx import to_onnx, write_onnx
from bitwright.export.recurrent import store_weights
from bitwright.export.verdict import LayerParity, OutputParity, Parity, worst_layer, worst_output
from bitwright.given.images import Images, load_images
from bitwright.graph import ops
from bitwright.graph.axes import read_outputs
from bitwright.graph.student import Student
from bitwright.memory import usual_pages
from bitwright.onnx_in.file import STANDARD
from bitwright.quant.quantizer import Frozen
from bitwright.run.files import target_file
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.openvino import OPENVINO, openvino_reads
from bitwright.runtimes.session import Opener, Session

CHECKED_IMAGES, LEAST_IMAGES = 32, 8
"""Images on which a file is compared, and on how many at least where the network is large."""
TOGETHER = 1 << 22
"""Values of images in one batch of a check: two runtimes and the simulation hold what they make of them."""
LAYER_IMAGES = 4
MANY_WEIGHTS = 50_000_000
"""Weights of a network from which on a check gives memory back at once, which costs time."""
CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "argmin"})
FEW = 0.9
"""Share of same answers below which a file that passed is warned of."""


def parity_of(
    runtime: str,
    images: Tensor,
    plain: list[OutputParity],
    optimized: list[OutputParity],
    layers: Sequence[LayerParity] = (),
) -> Parity:
    """The verdict: the first layer that diverges, else the first output, with optimisations off before on."""
    first, worst_plain = next((x for x in layers if x.diverges), None), worst_output(plain)
    divergence = None if first is None else first.name
    if first is not None and first.kernel:
        divergence = f"{first.name} (as ONNX Runtime's {first.kernel})"
    for output in (*plain, *optimized):
        if divergence is None and output.diverges:
            divergence = "the output" if len(plain) == 1 else f"the output {output.name}"
    return Parity(
        runtime=runtime,
        images=len(images),
        max_abs=worst_plain.max_abs,
        mean_abs=worst_plain.mean_abs,
        range=worst_plain.range,
        agreement=worst_plain.agreement,
        worst_layer=worst_layer(list(layers)),
        first_divergence=divergence,
        optimized=worst_output(optimized),
        batch_sizes=batch_sizes(images),
        outputs=plain,
        optimized_outputs=optimized,
    )


def export_checked(
    model: Student, path: Path, images: Any = None, *, force: bool = False, count: int = CHECKED_IMAGES
) -> Parity:
    """Writes an ONNX file and checks it against the simulation on real images.

    Args:
        model: frozen on the way.
        path: of the file.
        images: as everywhere; the calibration images if not given.
        force: keep a file that fails the check.
        count: images to run.

    Raises:
        UsageError: there are no images, or an operator cannot be exported.
        ParityError: the file computes something else; it is not written, unless ``force``.
    """
    path = target_file(path, ".onnx", force=force)
    data = images_of(model, images)
    batch = data.batch(range(min(count, len(data))))
    try:
        with usual_pages() if _is_large(model) else nullcontext():
            program, parity = _written(model, batch)
    except (BitwrightError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BitwrightError(f"This network could not be written as ONNX and checked ({reason}).") from error
    if parity.passed or force:
        whole = framed(program, model)
        if not force and (model.parts or model.interface is not None):
            _assert_opens(whole)
        write_onnx(whole, path)
    if not parity.passed and not force:
        worst = parity.worst_layer
        detail = f" (worst: {worst.name}, {worst.differing_fraction:.2%} of its values)" if worst else ""
        choice = _choice_before(model, parity.first_divergence)
        raise ParityError(
            "The ONNX file does not compute what was measured: "
            f"{parity.first_divergence} is the first to differ{detail}.{choice} It was not written; "
            "force=True keeps it."
        )
    return parity


def _assert_opens(program: ir.Model) -> None:
    """The whole file, with its user's names and what follows the body, must be one that ONNX Runtime reads.

    A file with operators of another domain is its user's to open, where these are known.

    Raises:
        ParityError: it does not.
    """
    if not program.opset_imports.keys() <= STANDARD | {DOMAIN}:
        return
    try:
        with session(program, optimize=False):
            pass
    except Exception as error:
        raise ParityError(
            f"ONNX Runtime does not open the ONNX file with the names and the last operators of yours: "
            f"{one_line(str(error))[:200]} It was not written; force=True keeps it."
        ) from error


def _is_large(model: Student) -> bool:
    """Whether its stored numbers take so much memory that what they become in a check must not be kept beside it."""
    return (
        sum(module.codes.numel() for module in model.freeze().graph.modules() if isinstance(module, Frozen))
        > MANY_WEIGHTS
    )


def _choice_before(model: Student, name: str | None) -> str:
    """A sentence about an operator ahead of a layer that takes some of equal values."""
    waiting = [n for n in model.graph.graph.nodes if name in {n.name, n.meta.get("layer")}]
    seen = set(waiting)
    while waiting:
        node = waiting.pop(0)
        if ops.base_name(node) in CHOICES:
            return (
                f" Ahead of it '{node.meta.get('layer', node.name)}' chooses among values that rounding makes equal, "
                "and every runtime takes others of those."
            )
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        waiting += fresh
    return ""


def _written(model: Student, images: Tensor) -> tuple[ir.Model, Parity]:
    """The file and its check; operators that ONNX Runtime's kernels compute otherwise are kept in float there."""
    program = to_onnx(model)
    if model.scheme.runtime == OPENVINO.name:
        store_weights(program)
    kernels: dict[str, LayerParity] | None = compare_kernels(model, program, images[:LAYER_IMAGES])
    wrong = [name for name, layer in (kernels or {}).items() if layer.diverges]
    if wrong:
        keep_in_float(program.graph, wrong)
        kernels = None
    parity = check_parity(model, program, images, kernels=kernels)
    if model.scheme.runtime == OPENVINO.name and OPENVINO.installed:
        _warn_of_openvino(model, program, images)
    own = [o.self_agreement for o in parity.optimized_outputs if o.agreement is not None and o.agreement < FEW]
    if parity.passed and own:
        same = worst_output(parity.optimized_outputs).agreement
        warnings.warn(
            f"The answers of this network depend on single roundings: the file gives the same on "
            f"{_share(same)} of the images, and so does the simulation itself on "
            f"{_share(min(x for x in own if x is not None))} where one code in a thousand is rounded the other way.",
            stacklevel=4,
        )
    return program, parity


def _share(x: float | None) -> str:
    return "some" if x is None else f"{100 * x:.0f} %"


def _warn_of_openvino(model: Student, program: ir.Model, images: Tensor) -> None:
    """Says what is different in OpenVINO about a file that was made for it."""
    name = f"{OPENVINO.name} {OPENVINO.version}"
    try:
        found = check_parity(model, program, images, name=name, opener=openvino_reads).first_divergence
    except BitwrightError as error:
        warnings.warn(f"OpenVINO could not run the ONNX file to check it: {error}", stacklevel=5)
        return
    if found is not None:
        warnings.warn(
            f"In OpenVINO, for which this network was quantized, the ONNX file computes something else than what was "
            f"measured: {found} is the first to differ. It is right in ONNX Runtime. For OpenVINO take the "
            "file of bitwright export --to openvino, which is checked there.",
            stacklevel=5,
        )


def images_of(model: Student, images: Any) -> Images:
    """The images to check a file with: those given, else those that the model was calibrated with.

    Raises:
        UsageError: there are none.
    """
    if images is None:
        images = model.calibration
    if images is None:
        raise UsageError("The check of the exported file needs a few images. Give images=.")
    if isinstance(images, Images):
        return images
    return load_images(images, model.preprocessing, inputs=model.input_names, channels_last=model.channels_last)


def check_parity(
    model: Student,
    program: ir.Model,
    images: Tensor,
    *,
    name: str | None = None,
    opener: Opener | None = None,
    file: Opener | None = None,
    kernels: dict[str, LayerParity] | None = None,
) -> Parity:
    """Compares file and simulation, layer by layer and as a whole, at two batch sizes.

    In ONNX Runtime every layer is compared twice: as the file has it, and as its optimisations make it.

    Args:
        model: frozen.
        program: from :func:`bitwright.export.onnx.to_onnx`.
        images: [N, C, H, W].
        name: of the runtime and its version; ONNX Runtime's if not given.
        opener: of another runtime than ONNX Runtime, for single layers.
        file: the same for the whole network; as single layers if not given.
        kernels: what :func:`bitwright.export.arbiter.compare_kernels` found, if it was asked already.
    """
    layers = compare_layers(model, program, images[:LAYER_IMAGES], opener)
    if opener is None and kernels is None:
        kernels = compare_kernels(model, program, images[:LAYER_IMAGES])
    layers += (kernels or {}).values()
    plain, optimized = compare_outputs(model, program, images, file or opener)
    return parity_of(name or _runtime_name(), images, plain, optimized, layers)


def check_once(model: Student, program: ir.Model, images: Tensor) -> Parity:
    """As :func:`check_parity` in ONNX Runtime, with the operators as the file has them and no optimisations."""
    layers = compare_layers(model, program, images[:LAYER_IMAGES])
    with session(program, optimize=False) as opened:
        found = compare_with(model, images, {"file": _runner(opened)})["file"]
    return parity_of(_runtime_name(), images, found, found, layers)


def _runtime_name() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def compare_outputs(
    model: Student, program: ir.Model, images: Tensor, opener: Opener | None = None
) -> tuple[list[OutputParity], list[OutputParity]]:
    """Every output in the runtime against the simulation's, at two batch sizes.

    Args:
        model: frozen.
        program: its file.
        images: [N, C, H, W].
        opener: opens the program; ONNX Runtime if not given.

    Returns:
        One record an output, with the runtime's optimisations off; and on.
    """
    with ExitStack() as exits:
        runs: dict[str, Forward] = {}
        for level in (False, True):
            opened = exits.enter_context((opener or session)(program, optimize=level))
            runs["on" if level else "off"] = _runner(opened)
        found = compare_with(model, images, runs)
    return found["off"], found["on"]


def _runner(opened: Session) -> Forward:
    name = opened.get_inputs()[0].name
    return lambda x: [torch.from_numpy(np.asarray(o)) for o in opened.run(None, {name: x.numpy()})]


def compare_with(model: Student, images: Tensor, runs: dict[str, Forward]) -> dict[str, list[OutputParity]]:
    """The simulation's outputs against those of whatever yields the same ones, at two batch sizes.

    Args:
        model: frozen.
        images: [N, C, H, W].
        runs: by name, what gives outputs for images.

    Returns:
        One record an output, by the names of ``runs``.
    """
    quantizers = activation_quantizers(model)

    def shaken(batch: Tensor) -> list[Tensor]:
        with tipped(quantizers):
            return model.flat(batch)

    with torch.no_grad():
        readings = read_outputs(model.graph, images[: batch_sizes(images)[-1]], model.outputs)
        return output_parities(
            model.outputs, readings, _in_batches(images, batch_sizes(images)), model.flat, shaken, runs
        )


def batch_sizes(images: Tensor) -> tuple[int, int]:
    """One image, and as many as there are beside it, up to 8, or 2 of large ones."""
    return 1, max(1, min(8, len(images) - 1, max(2, TOGETHER // max(1, images[0].numel()))))


def _in_batches(images: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Up to two images one by one, then the others in larger batches."""
    first = min(2, len(images))
    yield from torch.split(images[:first], sizes[0])
    if len(images) > first:
        yield from torch.split(images[first:], sizes[-1])
