"""Finds normalisations that blow up the rounding of what comes before them, and gives these tensors more bits.

A row that is far shorter than the others of its tensor falls into a few codes, or into none. A normalisation makes it
as long as the others, so that its error is as large as a whole row. Keeping the divisor in float does not help: the row
is lost before.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor, fx

from bitwright.given.arguments import as_rules
from bitwright.given.images import Images
from bitwright.graph import ops
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Rule, Scheme, escaped
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate

IMAGES = 16
WIDE, LEAST = 16, 8
"""Bits that tensors get, where these lose little; schemes with fewer than the second have chosen to lose more."""
LITTLE = 1.25
"""Times the mean error that float would leave in the rows."""
LOST = 0.5
"""A row is lost where its error has that share of its energy."""
COUNTS = 1e-3
"""A row counts where it has that share of the mean energy."""
SHARE = 0.005
"""Of the rows: fewer may be lost."""
TRIED = 6
"""Tensors before the normalisation, the nearest first."""


@dataclass(frozen=True)
class _End:
    """Where a normalisation ends: the node's name, its layer, and the axes of a row."""

    name: str
    layer: str
    axes: tuple[int, ...]


def keep_short_rows(teacher: Captured, scheme: Scheme, images: Images, run: Run) -> Scheme:
    """The scheme, with 16 bits or float for tensors whose rounding a normalisation behind them would blow up.

    Only normalisations that are written out are looked at, on a few calibration images and with float weights. Rules of
    the scheme come after the new ones. A warning says what was done.
    """
    bits, ends = scheme.activations, _ends(teacher.graph.graph)
    if not ends or bits is None or not LEAST <= bits < WIDE or scheme.plan:
        return scheme
    some = images.sample(min(IMAGES, len(images)), seed=run.seed)
    student = _calibrated(teacher, scheme, some, run)
    rows = _rows(teacher, student, ends, some, run)
    for end in (e for e in ends if rows[e.name].lost > SHARE):
        found = _widened(teacher, scheme, end, _before(student, end)[:TRIED], some, run)
        lost = rows[end.name].lost
        said = f"{lost:.0%} of the rows that '{end.layer}' normalises are lost at {bits} bits: they are short."
        if found is None:
            warnings.warn(
                f"{said} No single tensor before it can be blamed; compare with activations=16.", stacklevel=3
            )
            continue
        names = [r.pattern for r in found]
        got = f"{found[0].activations} bits" if found[0].activations == WIDE else "float"
        back = as_rules(f"{n}=a{bits}" for n in names)
        warnings.warn(f"{said} {', '.join(names)}: {got} instead. To take that back: {back}", stacklevel=3)
        scheme = scheme.model_copy(update={"rules": (*found, *scheme.rules)})
    return scheme


def _ends(graph: fx.Graph) -> list[_End]:
    found = []
    for node in graph.nodes:
        divisor = next((n for n in node.all_input_nodes if n.name == node.meta.get("divisor")), None)
        if divisor is None:
            continue
        while ops.kind(divisor) == "move" and ops.base_name(divisor) in {"expand", "expand_as", "alias"}:
            divisor = ops.moved(divisor)
        shape, cut = ops.shape(node), ops.shape(divisor)
        axes = tuple(i for i, (d, c) in enumerate(zip(shape, cut, strict=False)) if d != c)
        if len(shape) == len(cut) and axes and 0 not in axes:
            found.append(_End(node.name, str(node.meta["layer"]), axes))
    return found


def _calibrated(teacher: Captured, scheme: Scheme, images: Images, run: Run) -> Student:
    student = insert_quantizers(teacher, scheme.model_copy(update={"weights": None}))
    student.to(run.device)
    return Calibrate(weights="minmax", activations="minmax").run(student, teacher, images, run)


@dataclass
class _Rows:
    """Sums over the rows of one normalisation that count."""

    count: int = 0
    beyond: int = 0
    error: float = 0.0

    def update(self, exact: Tensor, found: Tensor, axes: tuple[int, ...]) -> None:
        energy = exact.square().sum(axes)
        error = (found - exact).nan_to_num(1e9).square().sum(axes) / energy.clamp_min(1e-30)
        counts = energy > COUNTS * energy.mean()
        self.count += int(counts.sum())
        self.beyond += int((error[counts] > LOST).sum())
        self.error += float(error[counts].sum())

    @property
    def lost(self) -> float:
        """Share of the rows."""
        return self.beyond / max(self.count, 1)


def _rows(teacher: Captured, student: Student, ends: list[_End], images: Images, run: Run) -> dict[str, _Rows]:
    """What becomes of the rows at each end."""
    exact: dict[str, Tensor] = {}
    found, axes = {e.name: _Rows() for e in ends}, {e.name: e.axes for e in ends}

    def remember(node: fx.Node, value: Tensor) -> None:
        exact[node.name] = value

    def compare(node: fx.Node, value: Tensor) -> None:
        found[node.name].update(exact[node.name], value, axes[node.name])

    for batch in images.batches(8, run.device):
        watch(teacher.graph, batch, dict.fromkeys(axes, remember))
        watch(student.graph, batch, dict.fromkeys(axes, compare))
    return found


def _widened(
    teacher: Captured, scheme: Scheme, end: _End, names: list[str], images: Images, run: Run
) -> tuple[Rule, ...] | None:
    """Rules that keep the rows of one normalisation: tensors before it, the nearest first, until they do."""

    def rows(rules: tuple[Rule, ...]) -> _Rows:
        tried = _calibrated(teacher, scheme.model_copy(update={"rules": (*scheme.rules, *rules)}), images, run)
        return _rows(teacher, tried, [end], images, run)[end.name]

    for count in range(1, len(names) + 1):
        in_float = tuple(Rule(pattern=escaped(n), activations="float") for n in names[:count])
        left = rows(in_float)
        if left.lost <= SHARE:
            wide = tuple(Rule(pattern=r.pattern, activations=WIDE) for r in in_float)
            possible = WIDE in scheme.target.activation_bits
            return wide if possible and rows(wide).error <= LITTLE * left.error else in_float
    return None


def _before(student: Student, end: _End) -> list[str]:
    """Names of quantized activations before a node, the nearest first."""
    nodes = {n.name: n for n in student.graph.graph.nodes}
    waiting, seen, found = [nodes[end.name]], {nodes[end.name]}, []
    while waiting:
        node = waiting.pop(0)
        module = student.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Quantizer) and module.role == "activation":
            found.append(module.name)
        more = [n for n in node.all_input_nodes if n not in seen]
        seen |= set(more)
        waiting += more
    return found
