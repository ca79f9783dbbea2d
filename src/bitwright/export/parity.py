"""Does the exported file compute what was measured? Asked of the runtime itself, on real images."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, fx

from bitwright.data import Images, load_images
from bitwright.errors import ParityError, UsageError
from bitwright.export.onnx import save_onnx, to_onnx
from bitwright.graph.watch import watch
from bitwright.metrics import Fidelity
from bitwright.quant.quantizer import Quantizer
from bitwright.quantized import QuantizedModel

if TYPE_CHECKING:
    from bitwright.export.runtimes import Opener

Array = npt.NDArray[np.float32]

MOST_DIFFERING = 1e-3
"""Share of a layer's values that float summation may tip over a rounding boundary."""
BOUNDARY = 16 * float(np.finfo(np.float32).eps)
"""Relative distance of a value from half a step, within which float summation decides how it is rounded. Pooling of
codes on one scale meets such values often: the mean of four integers lies there for one value in four."""
MOST_STEPS = 1
MOST_DEVIATION = 0.05
"""Mean difference of an output, in units of its range, beyond which the runtime is taken to compute something else."""
IMAGES = 32
LAYER_IMAGES = 4


@dataclass
class LayerParity:
    """One layer, fed the simulation's own input."""

    name: str
    differing_fraction: float
    max_steps: int
    values: int
    """How many codes were compared."""

    @property
    def diverges(self) -> bool:
        """See :func:`beyond`."""
        return beyond(round(self.differing_fraction * self.values), self.max_steps, self.values)


def beyond(differing: int, max_steps: int, count: int) -> bool:
    """Whether more codes differ, or by more steps, than summation in float32 explains; a single one always may.

    Example:
        >>> beyond(1, 1, 50), beyond(2, 1, 50), beyond(1, 2, 5000)
        (False, True, True)
    """
    return max_steps > MOST_STEPS or differing > max(1, MOST_DIFFERING * count)


@dataclass
class OutputParity:
    """The whole network, one level of the runtime's graph optimisations. Differences are in units of the output."""

    max_abs: float = 0.0
    mean_abs: float = 0.0
    range: float = 0.0
    agreement: float | None = None


@dataclass
class Parity:
    """What the check found; ``passed`` unless a layer, or an output by far, differs from the simulation.

    The figures of the whole network are those without graph optimisations; ``optimized`` holds those with them.
    """

    runtime: str
    images: int
    max_abs: float
    mean_abs: float
    range: float
    agreement: float | None
    worst_layer: LayerParity | None
    """None if no activation is quantized."""
    first_divergence: str | None
    optimized: OutputParity = field(default_factory=OutputParity)
    batch_sizes: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the file may be shipped."""
        return self.first_divergence is None

    def to_dict(self) -> dict[str, Any]:
        """As in ``result.json``."""
        return asdict(self)


def export_checked(
    model: QuantizedModel, path: Path, images: Any = None, *, force: bool = False, count: int = IMAGES
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
    batch = _images(model, images, count)
    program = to_onnx(model)
    parity = check_parity(model, program, batch)
    if parity.passed or force:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_onnx(program, path)
    if not parity.passed and not force:
        worst = parity.worst_layer
        detail = f" (worst: {worst.name}, {worst.differing_fraction:.2%} of its values)" if worst else ""
        raise ParityError(
            "The ONNX file does not compute what was measured: "
            f"{parity.first_divergence} is the first to differ{detail}. It was not written; --force keeps it."
        )
    return parity


def _images(model: QuantizedModel, images: Any, count: int) -> Tensor:

    if images is None:
        images = model.calibration
    if images is None:
        raise UsageError("The check of the exported file needs a few images. Give --images.")
    data = images if isinstance(images, Images) else load_images(images, model.preprocessing)
    return data.batch(range(min(count, len(data))))


def check_parity(
    model: QuantizedModel,
    program: ir.Model,
    images: Tensor,
    *,
    name: str | None = None,
    opener: Opener | None = None,
    file: Opener | None = None,
) -> Parity:
    """Compares file and simulation, layer by layer and as a whole, at two batch sizes.

    Args:
        model: frozen.
        program: from :func:`bitwright.export.onnx.to_onnx`.
        images: [N, C, H, W].
        name: of the runtime and its version; ONNX Runtime's if not given.
        opener: of another runtime than ONNX Runtime, for single layers.
        file: the same for the whole network; as single layers if not given.
    """
    opener = opener or session
    layers = compare_layers(model, program, images[:LAYER_IMAGES], opener)
    sizes = batch_sizes(images)
    plain = compare_outputs(model, program, images, sizes, optimize=False, opener=file or opener)
    optimized = compare_outputs(model, program, images, sizes, optimize=True, opener=file or opener)
    return Parity(
        runtime=name or _runtime_name(),
        images=len(images),
        **asdict(plain),
        worst_layer=max(layers, key=lambda x: (x.max_steps > MOST_STEPS, x.differing_fraction), default=None),
        first_divergence=_first_divergence(layers, plain, optimized),
        optimized=optimized,
        batch_sizes=sizes,
    )


def _first_divergence(layers: list[LayerParity], *whole: OutputParity) -> str | None:
    for layer in layers:
        if layer.diverges:
            return layer.name
    if any(not output.mean_abs <= MOST_DEVIATION * max(output.range, 1e-12) for output in whole):
        return "the output"
    return None


def _runtime_name() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@contextmanager
def session(program: ir.Model, *, optimize: bool, dump: Path | None = None) -> Iterator[Any]:
    """An ONNX Runtime session on the CPU; the graph that it runs is written to ``dump``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(program, path)
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare_outputs(
    model: QuantizedModel,
    program: ir.Model,
    images: Tensor,
    sizes: tuple[int, ...],
    *,
    optimize: bool,
    opener: Opener | None = None,
) -> OutputParity:
    """The whole network in the runtime against the simulation, the images split over the batch sizes."""
    with (opener or session)(program, optimize=optimize) as runtime:
        return compare_with(
            model,
            images,
            sizes,
            lambda x: [torch.from_numpy(o) for o in runtime.run(None, {"images": x.numpy()})],
        )


def compare_with(
    model: QuantizedModel, images: Tensor, sizes: tuple[int, ...], run: Callable[[Tensor], list[Tensor]]
) -> OutputParity:
    """The simulation against whatever yields the same outputs, the images split over the batch sizes."""
    fidelity, total, count = Fidelity(), 0.0, 0
    low, high, worst = float("inf"), float("-inf"), 0.0
    for batch in _in_batches(images, sizes):
        with torch.no_grad():
            expected, found = model.flat(batch), run(batch)
        fidelity.update(expected, found)
        for a, b in zip(expected, found, strict=True):
            difference = (a - b).abs().double()
            worst, total, count = (
                max(worst, float(difference.max())),
                total + float(difference.sum()),
                count + a.numel(),
            )
            low, high = min(low, float(a.min())), max(high, float(a.max()))
    agreement = fidelity.result()["agreement"]
    return OutputParity(max_abs=worst, mean_abs=total / max(count, 1), range=high - low, agreement=agreement)


def batch_sizes(images: Tensor) -> tuple[int, int]:
    """One image, and several as far as there are some."""
    return 1, max(1, min(8, len(images) - 1))


def _in_batches(images: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Up to two images one by one, then the others in larger batches."""
    first = min(2, len(images))
    yield from torch.split(images[:first], sizes[0])
    if len(images) > first:
        yield from torch.split(images[first:], sizes[-1])


def compare_layers(
    model: QuantizedModel, program: ir.Model, images: Tensor, opener: Opener | None = None
) -> list[LayerParity]:
    """Every layer in the runtime, optimisations off, fed the simulation's own input: how many codes differ.

    A code that is off by one where the value lies on the boundary between two does not count: both are right.
    """
    quantizers = activation_quantizers(model)
    simulated, ties = _simulate(model, images, quantizers)
    if not simulated:
        return []
    cut, names = _cut(program, set(simulated))
    with (opener or session)(cut, optimize=False) as runtime:
        wanted = {i.name for i in runtime.get_inputs()}
        feed = {f"{n}/fed": v.numpy() for n, v in simulated.items() if f"{n}/fed" in wanted}
        if "images" in wanted:
            feed["images"] = images.numpy()
        outputs = runtime.run([f"{n}/value" for n in names], feed)
    return [
        _compare_layer(quantizers[n], simulated[n].numpy(), out, ties[n]) for n, out in zip(names, outputs, strict=True)
    ]


def _simulate(
    model: QuantizedModel, images: Tensor, quantizers: dict[str, Quantizer]
) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[np.bool_]]]:
    """What each quantizer returns, and where its input lies on a boundary."""
    simulated: dict[str, Tensor] = {}
    ties: dict[str, npt.NDArray[np.bool_]] = {}
    readers: dict[str, list[str]] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        if node.name in quantizers:
            simulated[node.name] = value
        for reader in readers.get(node.name, []):
            ties[reader] = on_boundary(value, quantizers[reader])

    for node in model.graph.graph.nodes:
        if node.name in quantizers:
            readers.setdefault(node.args[0].name, []).append(node.name)
    watch(model.graph, images, dict.fromkeys([*quantizers, *readers], keep))
    return simulated, ties


def on_boundary(x: Tensor, quantizer: Quantizer) -> npt.NDArray[np.bool_]:
    """Where a value lies halfway between two codes, as far as float32 can tell."""
    steps = x.double() / quantizer.expanded()[0].double()
    return ((steps - steps.floor() - 0.5).abs() <= BOUNDARY * steps.abs().clamp(min=1)).numpy()


def activation_quantizers(model: QuantizedModel) -> dict[str, Quantizer]:
    """Quantizers of activations by node name, in program order."""
    found = {}
    for node in model.graph.graph.nodes:
        if node.op == "call_module" and node.args:
            module = model.graph.get_submodule(str(node.target))
            if isinstance(module, Quantizer):
                found[node.name] = module
    return found


def _compare_layer(quantizer: Quantizer, expected: Array, found: Array, ties: npt.NDArray[np.bool_]) -> LayerParity:
    steps = np.rint(np.abs(expected.astype(np.float64) - found) / quantizer.expanded()[0].numpy())
    steps[ties & (steps <= MOST_STEPS)] = 0
    return LayerParity(quantizer.name, float((steps > 0).mean()), int(steps.max(initial=0)), steps.size)


def _cut(program: ir.Model, names: set[str]) -> tuple[ir.Model, list[str]]:
    """The network cut at every activation quantizer: its value is an output, and what reads it reads an input."""
    cut = copy.deepcopy(program) if not hasattr(program, "clone") else program.clone()
    graph, found = cut.graph, []
    graph.outputs.clear()
    for node in list(graph):
        for value in node.outputs:
            name = (value.name or "").removesuffix("/value")
            if name not in names or not (value.name or "").endswith("/value"):
                continue
            fed = ir.Value(name=f"{name}/fed", shape=value.shape, type=value.type)
            if value.uses():
                value.replace_all_uses_with(fed)
                graph.inputs.append(fed)
            graph.outputs.append(value)
            found.append(name)
    return cut, found
