"""How a run was made, as its page and its table tell it."""

from __future__ import annotations

import re
from typing import Any

from bitwright.cli.tables import tuning_text
from bitwright.report.making import training
from bitwright.report.shown import Shown
from bitwright.run.result import RunResult


def tuned(before: float, after: float, by_stage: dict[str, float], kept: str) -> dict[str, Any]:
    """What a stage of kind ``reconstruct`` tells."""
    loss = {"soft": None, "hard": after, "by_stage": by_stage}
    facts = {"steps": 100, "precision": "float32", "batch": 4, "left_nearest": 0.25, "kept": kept, "loss": loss}
    return {"kind": "reconstruct", "seconds": 1.0, "before": before, "after": after, **facts}


FIRST = tuned(9.0, 4.0, {"calibrate": 9.0, "reconstruct": 4.0}, "reconstruct")
SECOND = tuned(5.0, 3.0, {"calibrate": 8.0, "reconstruct": 5.0, "reconstruct 2": 3.0}, "reconstruct 2")
TWICE = {"stages": [{"kind": "calibrate"}, FIRST, SECOND], "reconstruct": SECOND, "layers": []}


def losses(markup: str) -> list[list[float]]:
    """Numbers in each table of a piece of a page."""
    tables = re.findall(r"<tbody>(.*?)</tbody>", markup, re.DOTALL)
    return [[float(n) for n in re.findall(r"<td[^>]*>([\d.]+)</td>", table)] for table in tables]


def test_each_of_two_optimisations_is_credited_with_its_own_losses() -> None:
    section = training(Shown(RunResult.read(TWICE)))
    assert section is not None
    shown = "".join(str(part) for part in section.body)  # type: ignore[union-attr]
    assert re.findall(r"<h3>(.*?)</h3>", shown) == ["Reconstruction 1", "Reconstruction 2"]
    assert losses(shown) == [[9.0, 4.0], [5.0, 3.0]]
    texts = [tuning_text(row) for row in RunResult.read(TWICE).tunings]
    assert [t.split(", ")[1] for t in texts] == ["loss 9 to 4", "loss 5 to 3"]


def test_a_stage_that_lowered_nothing_says_what_was_kept() -> None:
    worse = tuned(5.0, 5.0, {"calibrate": 8.0, "reconstruct": 5.0, "reconstruct 2": 6.0}, "reconstruct")
    section = training(Shown(RunResult.read({"stages": [FIRST, worse], "reconstruct": worse})))
    assert section is not None
    first, second = (str(part) for part in section.body)  # type: ignore[union-attr]
    assert "is kept" not in first
    assert "It did not lower the loss: what" in second


def test_an_older_result_that_lists_no_stages_has_one() -> None:
    old = {key: value for key, value in FIRST.items() if key not in {"kind", "before", "after"}}
    section = training(Shown(RunResult.read({"reconstruct": old})))
    assert section is not None
    assert re.findall(r"<h3>(.*?)</h3>", "".join(map(str, section.body))) == ["Reconstruction"]  # type: ignore[arg-type]
    assert (
        tuning_text(*RunResult.read({"reconstruct": old}).tunings)
        == "100 steps, loss 4, 25 % of weights not at their nearest"
    )
