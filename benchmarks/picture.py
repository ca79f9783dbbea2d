"""The picture of accuracy against size on the first page, from the figures that are committed.

Files of 8 bits are those of ``benchmarks/results``. Of 4 bits the accuracies stand in ``docs/results.md``, and the size
of the file in ``benchmarks/results``.

    python -m benchmarks.picture
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bitwright.measure.metrics import wilson_interval

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "accuracy-size.svg"
STATIC, DEPLOY = (ROOT / "benchmarks" / "results" / f"2026-11-22-{what}-cpu.json" for what in ("static", "deploy"))
NETWORK, IMAGES = "efficientnet_lite0", 500
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 64, 20, 20, 52
SIZES, SHARES = (2.2, 24.0), (0.62, 0.93)
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .axis { stroke: #999 } .grid { stroke: #8883 }
.ours { fill: #0a6ebd; stroke: #0a6ebd } .peer { fill: #d9730d; stroke: #d9730d } .float { fill: #777; stroke: #777 }
text.ours, text.peer, text.float { stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .ours { fill: #5bb3f5; stroke: #5bb3f5 } }
</style>"""


class Point(NamedTuple):
    """A file: what made it, whose it is, its megabytes and accuracy."""

    words: str
    whose: str
    size: float
    share: float
    shift: float = 0.0
    """Pixels to the right, since neighbours of one size would cover each other."""
    aside: tuple[float, float] = (14.0, 4.0)
    """Pixels from the point to the start of its words, to the right and down."""


def points() -> Iterator[Point]:
    """The files, from the figures."""
    (rows,) = (r["files"] for r in json.loads(STATIC.read_text())["static"]["results"] if r["model"] == NETWORK)
    shares = {name: row["top1"] for name, row in rows.items()}
    sizes = {name: row["bytes"] / 1e6 for name, row in rows.items()}
    yield Point(f"float: {_percent(shares['float'])} %", "float", sizes["float"], shares["float"], aside=(-36, -38))
    peers = [name for name in rows if name.startswith("quantize_static")]
    ends = [_percent(end(shares[name] for name in peers)) for end in (min, max)]
    words = f"ONNX Runtime's tool, 8 bits, three methods: {ends[0]} to {ends[1]} %"
    for i, name in enumerate(peers):
        yield Point("" if i < len(peers) - 1 else words, "peer", sizes[name], shares[name], 8 * (i + 1), (0, 52))
    for i, recipe in enumerate(("mse", "optq")):
        share = shares[f"bitwright {recipe}"]
        words = f"mse and optq, 8 bits: {_percent(share)} %" if i else ""
        yield Point(words, "ours", sizes[f"bitwright {recipe}"], share, 8 * (i - 1), (0, -34))
    rows = json.loads(DEPLOY.read_text())["deploy"]["results"]
    (bytes_,) = (r["bytes"]["model.onnx"] for r in rows if (r["network"], r["bits"]) == (NETWORK, "W4A8"))
    for i, (recipe, share) in enumerate(zip(("mse", "optq", "eptq"), _shares_at_four_bits(), strict=True)):
        yield Point(
            f"{recipe}, 4 bits: {_percent(share)} %", "ours", bytes_ / 1e6, share, 8 * i, (28 - 8 * i, 10 - 6 * i)
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _shares_at_four_bits() -> list[float]:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    row = re.search(r"^\| EfficientNet-Lite0 \| W4A8 \| [\d.]+ \|(.*)$", page, flags=re.MULTILINE)
    assert row is not None
    return [float(cell.replace("*", "").split()[0]) / 100 for cell in row[1].split("|")[:3]]


def svg() -> str:
    """The picture."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', STYLE]
    parts.append("<title>EfficientNet-Lite0: top-1 accuracy against megabytes of the ONNX file</title>")
    for share in (0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        parts.append(f'<path class="grid" d="M{LEFT} {_y(share):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{_y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for size in (3, 5, 10, 20):
        parts.append(f'<path class="axis" d="M{_x(size):.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(f'<text x="{_x(size):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{size}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">megabytes of the ONNX file</text>')
    for i, (whose, who) in enumerate((("ours", "bitwright"), ("peer", "ONNX Runtime's quantize_static"))):
        parts.append(f'<circle class="{whose}" cx="480" cy="{250 + 22 * i}" r="5"/>')
        parts.append(f'<text x="492" y="{254 + 22 * i}">{who}</text>')
    parts += [line for point in points() for line in _drawn(point)]
    return "\n".join([*parts, "</svg>", ""])


def _drawn(point: Point) -> Iterator[str]:
    x, y = _x(point.size) + point.shift, _y(point.share)
    low, high = wilson_interval(round(point.share * IMAGES), IMAGES)
    yield f'<path class="{point.whose}" d="M{x:.1f} {_y(low):.1f}V{_y(high):.1f}"/>'
    yield f'<circle class="{point.whose}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if point.words:
        place = f'x="{x + point.aside[0]:.1f}" y="{y + point.aside[1]:.1f}"'
        yield f'<text class="{point.whose}" {place}>{point.words}</text>'


def _x(size: float) -> float:
    low, high = map(math.log, SIZES)
    return LEFT + (math.log(size) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return TOP + (SHARES[1] - share) / (SHARES[1] - SHARES[0]) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
