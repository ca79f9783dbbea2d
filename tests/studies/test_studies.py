"""Studies on tiny networks: what is varied, what is shared, what is kept; and that every one is found by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cases import dataset, images, make

import bitwright
from bitwright.errors import UsageError
from bitwright.recipes import builtin_recipes as recipes
from bitwright.recipes import recipe
from bitwright.report.panels import Figure
from bitwright.run.files import read_checked, write_checked
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.reconstruct import Reconstruct
from bitwright.studies import StudyResult, builtin_studies, find_study, study
from bitwright.studies.base import KeptRows, Study
from bitwright.studies.subject import split

NAMES = {
    *("calibration-size", "fitness", "gradual", "hmse", "iterations", "landscape", "lfh", "search", "weighting"),
    *("mixed-precision", "around"),
}
TINY: dict[str, Any] = {"samples": 6, "seeds": (0, 1)}


def run(name: str, **settings: Any) -> StudyResult:
    data = dataset(16)
    return study(name, make("residual"), data, **{**TINY, **settings})


def of(rows: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[k] == v for k, v in key.items())]


def test_every_study_is_found() -> None:
    assert set(builtin_studies()) == NAMES
    for found in builtin_studies().values():
        assert isinstance(found, Study)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}(v\d)?", found.paper)
        assert found.reading
        assert found.reproduces
    assert bitwright.study is study


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'weighting'"):
        find_study("wieghting")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("hmse", {"steps": 3}, "no use for steps="),
        ("lfh", {"weights": 4}, "no use for weights="),
        ("lfh", {"activations": "8"}, "no use for activations="),
        ("weighting", {"steps": 0}, "at least 1 step, found 0"),
        ("weighting", {"samples": 0}, "at least 1 sample, found 0"),
        ("weighting", {"weights": "3,9"}, "found '9'"),
        ("weighting", {"weights": "float"}, "found 'float'"),
        ("weighting", {"seeds": ()}, "at least one seed"),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        find_study(name).settle(**given)


def test_settings_are_taken_over() -> None:
    found = find_study("gradual").settle(weights="3, 4", activations="float", seeds=[2, 2, 1], samples=5, steps=7)
    assert (found.weights, found.activations, found.seeds, found.samples, found.steps) == ((3, 4), None, (2, 1), 5, 7)


def test_images_to_measure_on_are_never_calibrated_on() -> None:
    pool, held_out = split(dataset(16))
    assert [int(n) for n in held_out.names] == [3, 7, 11, 15]
    assert not set(pool.names) & set(held_out.names)
    assert len(pool) == 12
    assert [len(part) for part in split(dataset(2))] == [1, 1]
    with pytest.raises(UsageError, match="at least 2 images"):
        split(dataset(1))


def test_weighting_shares_one_start_and_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Calibrate.run

    def counted(self: Calibrate, *args: Any) -> Any:
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(Calibrate, "run", counted)
    rows = run("weighting", steps=3).rows
    assert len(calls) == 1
    assert [(r["variant"], r["seed"]) for r in rows] == [
        ("before", 0), *((w, s) for w in ("ones", "lfh", "sla", "sla-log") for s in (0, 1)),
    ]  # fmt: skip
    assert len({r["kl"] for r in of(rows, seed=0)}) == 5
    starts = {r["loss_before"] for r in of(rows, variant="ones")}
    assert len(starts) == 1
    assert all(r["loss"] != r["loss_before"] for r in of(rows, variant="ones"))


def test_a_study_is_the_same_each_time() -> None:
    one, two = (run("gradual", steps=3, seeds=(1,)) for _ in range(2))
    assert [{**r, "seconds": 0} for r in one.rows] == [{**r, "seconds": 0} for r in two.rows]
    assert len({r["kl"] for r in one.rows}) == 5


def test_gradual_varies_the_schedule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Reconstruct] = []
    monkeypatch.setattr(Reconstruct, "run", lambda self, student, *_: seen.append(self) or student)
    run("gradual", steps=3, seeds=(0,))
    assert [None if s.gradual is None else s.gradual.how for s in seen] == [None, "linear", "cosine", "drop"]
    assert len({s.model_copy(update={"gradual": None}) for s in seen}) == 1
    assert {s.steps for s in seen} == {3}


def test_around_runs_every_recipe_without_labels_and_draws_it_over_its_time() -> None:
    result = run("around", steps=1, seeds=(0,))
    assert {r["variant"] for r in result.rows} == {
        n for n, r in recipes().items() if not r.reads_labels and not n.endswith("-paper")
    }
    assert all(r["cpu_seconds"] > 0 for r in result.rows)
    assert all(("steps" in r) == recipes()[r["variant"]].optimises for r in result.rows)
    drawn = builtin_studies()["around"].figure(result)
    assert {s.name for s in drawn.rows[0][0].series} == {r["variant"] for r in result.rows}
    at = {s.name: list(s.x) for s in drawn.rows[0][0].series}
    assert all([r["cpu_seconds"]] == at[r["variant"]] for r in result.rows)


def test_around_names_those_that_no_other_beats() -> None:
    rows = [
        {"network": "n", "weights": 3, "activations": 4, "variant": name, "seed": 0, "kl": kl, "cpu_seconds": seconds}
        for name, kl, seconds in (("slow", 0.1, 9.0), ("quick", 0.3, 1.0), ("beaten", 0.4, 2.0))
    ]
    study = builtin_studies()["around"]
    (said,) = StudyResult(study, {}, rows).verdict
    assert "than quick (1 s), slow (9 s)." in said


def test_iterations_take_the_steps_they_say() -> None:
    rows = run("iterations", steps=4, seeds=(0,)).rows
    assert [r.get("steps") for r in rows] == [None, 1, 2, 4]
    assert len({r["kl"] for r in rows}) == 4


def test_calibration_size_draws_others_for_each_seed() -> None:
    rows = run("calibration-size", steps=2, samples=12).rows
    assert {r["images"] for r in rows} == {12}
    before = of(rows, variant="before")
    assert [r["seed"] for r in before] == [0, 1]
    fewer = of(run("calibration-size", steps=2, samples=5).rows, variant="before")
    assert fewer[0]["kl"] != fewer[1]["kl"]


def test_hmse_has_the_smallest_weighted_error_and_minmax_the_largest() -> None:
    rows = run("hmse", samples=12, weights=3).rows
    error = {r["variant"]: r["objective"] for r in rows}
    assert error["HMSE"] < error["MSE, p = 2"] < error["min-max"]
    assert [r["seed"] for r in of(rows, variant="HMSE")] == [0, 1]
    assert all("activations" in r and r["activations"] is None for r in rows)


def test_labels_are_measured_with_intervals() -> None:
    labelled = dataset(8, seed=5).labelled([0, 1, 2, 3] * 2)
    found = run("hmse", weights=8, evaluate=labelled)
    about = found.facts["networks"][0]
    assert about["held_out"] == {"count": 8, "sha256": labelled.sha256, "labelled": True}
    assert about["calibration"]["available"] == 16
    assert about["float"]["top1"] == found.rows[0]["top1"]
    assert found.rows[0]["top1_ci"][0] < found.rows[0]["top1"] < found.rows[0]["top1_ci"][1]
    assert "top1" in found.summary[0]
    lfh = run("lfh", seeds=(0,), samples=8, evaluate=labelled)
    assert "cross-entropy, true labels" in {r["loss"] for r in lfh.rows}


def test_finished_rows_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "rows.json"
    whole = run("weighting", steps=2, kept=kept)
    text = read_checked(kept)
    assert len(text["rows"]) == 9
    text["rows"] = text["rows"][:4]
    write_checked(kept, text)
    done: list[str] = []
    original = Reconstruct.run

    def counted(self: Reconstruct, *args: Any) -> Any:
        done.append(self.weigh)
        return original(self, *args)

    monkeypatch.setattr(Reconstruct, "run", counted)
    again = run("weighting", steps=2, kept=kept, resume=True)
    assert done == ["lfh", "sla", "sla", "sla-log", "sla-log"]
    assert [r["kl"] for r in again.rows] == [r["kl"] for r in whole.rows]
    with pytest.raises(UsageError, match="had other settings"):
        run("weighting", steps=3, kept=kept, resume=True)
    with monkeypatch.context() as patch:  # the same command with another version of the recipe
        changed = (Calibrate(weights="minmax"), *recipe("eptq").stages[1:])
        patch.setitem(recipes(), "eptq", recipe("eptq").model_copy(update={"stages": changed}))
        with pytest.raises(UsageError, match="had other settings"):
            run("weighting", steps=2, kept=kept, resume=True)
    kept.write_text("{}")
    with pytest.raises(UsageError, match="holds no rows"):
        run("weighting", steps=2, kept=kept, resume=True)


def test_kept_rows_survive_a_kill_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    KeptRows(path, "me").add({"a": 1}, {"kl": 1.0})
    rows = KeptRows(path, "me", resume=True)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rows.add({"a": 2}, {"kl": 2.0})
    assert KeptRows(path, "me", resume=True).get({"a": 1}) == {"kl": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_pages_need_no_network(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {} if name in {"hmse", "lfh"} else {"steps": 2}
    if name == "mixed-precision":
        settings["recipe"] = "mse"  # which has nothing to say of so few steps
    found = run(name, seeds=(0,), **{"samples": 8} | settings)
    data, page = found.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.html", f"{name}.json"]
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text)
    assert "Content-Security-Policy" in text
    assert ("Plotly.newPlot" in text) == (name == "landscape")
    assert ("unsafe-eval" in text) == (name == "landscape")
    assert "How to read it" in text
    written = json.loads(data.read_text())
    assert written["study"]["name"] == name
    assert {"bitwright", "torch", "settings", "networks", "rows", "summary", "seconds"} <= set(written)
    drawn = found.figure()
    assert sum(len(s.y) for s in drawn.series) >= len(found.rows)
    if isinstance(drawn, Figure):
        panels = [panel for row in drawn.rows for panel in row]
        assert text.count('class="chart"') == len(panels)
        assert all(any(len(s.y) for s in panel.series) for panel in panels)


def test_model_and_images_go_together() -> None:
    with pytest.raises(UsageError, match="MODEL and IMAGES"):
        study("hmse", make("residual"))
    with pytest.raises(UsageError, match="evaluate="):
        study("hmse", make("residual"), images(8), labels=[0] * 8)
