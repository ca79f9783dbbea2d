"""The landscape study on a tiny transformer: one set of points for all losses, and a student that comes back whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import dataset, make

from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.given.models import Model
from bitwright.graph.student import Student
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run
from bitwright.stages.candidates import Fitness
from bitwright.stages.evolve import scale_keys
from bitwright.studies import landscape, study
from bitwright.studies.base import StudyResult
from bitwright.studies.landscape import SCANS, Scan, scan, summarise, verdict
from bitwright.studies.roughness import directions, offsets
from bitwright.studies.rows import Row
from bitwright.studies.scales import measured_batches, middle_blocks
from bitwright.studies.subject import Subject

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 3] * 3


def begun(name: str = "transformer", labelled: bool = False) -> tuple[Subject, Student, list[str]]:
    held_out = dataset(12, seed=5)
    images = held_out.labelled(LABELS) if labelled else held_out
    subject = Subject(Model(make(name), name, None), dataset(12), images, CPU)
    student = subject.begin(Scheme(weights=3, activations=8), recipe("mse").stages, subject.pool, 0)
    return subject, student, scale_keys(student, middle_blocks(subject)[0])


def count(student: Student, keys: list[str]) -> int:
    return sum(student.quantizer(k).scale.numel() for k in keys)


def state(student: Student) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in student.graph.named_buffers()}


@pytest.mark.parametrize("kind", [*SCANS.values(), Scan(axes=2, meaning="keep")])
def test_a_scan_leaves_the_student_as_it_was(kind: Scan) -> None:
    subject, student, keys = begun()
    batches, distances = measured_batches(subject, subject.held_out, 6, Run())
    before = state(student)
    changes = offsets(directions(count(student, keys), 0), 1, kind.axes) * 0.05
    found = scan(student, keys, batches, distances, changes, kind)
    assert found.shape == (len(changes), len(distances.names))
    assert len({tuple(row) for row in found.tolist()}) > 1
    after = state(student)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_scan_that_is_interrupted_does_too() -> None:
    subject, student, keys = begun()
    batches, distances = measured_batches(subject, subject.held_out, 6, Run())
    before = state(student)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    changes = torch.full((2, count(student, keys)), 0.1, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        scan(student, keys, batches, distances, changes, SCANS["line, integers kept"], interrupt)
    assert all(torch.equal(before[k], v) for k, v in state(student).items())


@pytest.mark.parametrize("meaning", ["round", "keep"])
def test_no_change_gives_the_losses_of_the_student_each_as_it_is_alone(meaning: Any) -> None:
    subject, student, keys = begun(labelled=True)
    batches, distances = measured_batches(subject, subject.held_out, 6, Run())
    assert distances.names == ("infonce", "mse", "cosine", "kl", "cross-entropy", "agreement", "top1")
    nothing = torch.zeros(1, count(student, keys), dtype=torch.float64)
    (found,) = scan(student, keys, batches, distances, nothing, Scan(meaning=meaning))
    alone, _ = measured_batches(subject, subject.held_out.unlabelled(), 6, Run())
    for i, name in enumerate(("infonce", "mse", "cosine", "kl")):
        own = alone.losses(student.flat, Fitness(name)).double().mean()  # type: ignore[arg-type]
        assert float(found[i]) == pytest.approx(float(own), rel=1e-5)
    scores = student(subject.held_out.batch(range(12)))
    labels = torch.tensor(LABELS)
    assert float(found[4]) == pytest.approx(float(torch.nn.functional.cross_entropy(scores, labels)), rel=1e-5)
    assert float(found[6]) == pytest.approx(float((scores.argmax(1) == labels).double().mean()))


def run(**settings: Any) -> landscape.Result:
    given: dict[str, Any] = {"steps": 1, "weights": 3, "seeds": (0,), "samples": 8, "evaluate": dataset(8, seed=5)}
    return study("landscape", make("transformer"), dataset(12), **given | settings)


def test_all_losses_are_of_the_same_points_whatever_the_labels() -> None:
    held_out = dataset(8, seed=5)
    plain, labelled = run(), run(evaluate=held_out.labelled(LABELS[:8]))
    for a, b in zip(plain.rows, labelled.rows, strict=True):
        assert set(b["values"]) - set(a["values"]) == {"cross-entropy", "top1"}
        assert all(a["values"][n] == b["values"][n] for n in a["values"])


def test_rows_hold_grids_and_lines_with_the_calibrated_scales_in_the_middle() -> None:
    rows = run(seeds=(0, 1)).rows
    assert [(r["scan"], r["seed"]) for r in rows[:8]] == [(s, seed) for s in SCANS for seed in (0, 1)]
    grid, line = rows[0], rows[2]
    assert len(grid["at"]) == 3
    assert [len(v) for v in grid["values"]["kl"]] == [3] * 3
    assert len(line["values"]["kl"]) == len(line["at"]) == 9
    assert line["at"][4] == 0
    assert line["values"]["kl"][4] == grid["values"]["kl"][1][1]
    assert rows[0]["values"]["kl"] != rows[1]["values"]["kl"]
    assert line["at"][-1] == pytest.approx(landscape.RADIUS)
    absolute = next(r for r in rows if r["scan"] == "line, absolute")
    assert absolute["at"][-1] == pytest.approx(1e-3)


def test_a_block_of_every_kind_is_looked_at_and_no_chain_beside_them() -> None:
    subject, _, _ = begun()
    kinds = [b.kind for b in middle_blocks(subject)]
    assert kinds[0] == "attention"
    assert "chain" not in kinds
    alone = Subject(Model(make("conv_bn_relu6"), "plain", None), dataset(6), dataset(6), CPU)
    assert [b.kind for b in middle_blocks(alone)] == ["chain"]


def made(network: str, kind: str, bits: int, bends: dict[str, float], jumps: float = 1.0) -> list[Row]:
    own = {n: {"minima": 0.1, "bends": b, "jumps": jumps, "range": 1.0} for n, b in bends.items()}
    key = {"network": network, "block": kind, "kind": kind, "weights": bits, "activations": 8, "seed": 0, "at": [0] * 9}
    half = {n: {**r, "jumps": r["jumps"] / 2} for n, r in own.items()}
    spread = {"agreement": 0.25}
    return [
        {**key, "scan": "grid", "roughness": own, "spread": spread},
        {**key, "scan": "line", "roughness": own, "spread": spread},
        {**key, "scan": "line, integers kept", "roughness": half, "spread": spread},
    ]


def said(rows: list[Row]) -> str:
    return "\n".join(verdict(StudyResult(landscape.STUDY, {}, rows)))


def test_the_verdict_follows_the_figures() -> None:
    paper = [
        *made("vit", "attention", 3, {"infonce": 0.2, "kl": 0.4}, jumps=6.0),
        *made("vit", "attention", 8, {"infonce": 0.2, "kl": 0.4}),
        *made("vit", "mlp", 3, {"infonce": 0.05, "kl": 0.2}, jumps=6.0),
        *made("vit", "mlp", 8, {"infonce": 0.05, "kl": 0.2}),
        *made("cnn", "residual", 3, {"infonce": 0.01, "kl": 0.1}, jumps=6.0),
        *made("cnn", "residual", 8, {"infonce": 0.01, "kl": 0.1}),
    ]
    text = said(paper)
    assert "Transformers against the others: rougher at 3 bits" in text
    assert "Attention against MLP in vit: rougher at 3 bits (0.3 against 0.12)" in text
    assert "smoothest loss in 6 of 6" in text
    assert "against the paper" not in text
    assert "6 times as large at 3 bits as at 8" in text
    assert "50 % smaller" in text
    contrary = said(
        [
            *made("vit", "attention", 3, {"infonce": 0.4, "kl": 0.2}),
            *made("cnn", "residual", 3, {"infonce": 0.5, "kl": 0.4}),
        ]
    )
    assert "smoother at 3 bits (0.3 against 0.45): against the paper" in contrary
    assert "smoothest loss in 0 of 2" in contrary
    assert "rougher, against the paper" in contrary


def test_summaries_keep_the_spread_of_answers() -> None:
    (row,) = summarise(made("vit", "mlp", 3, {"kl": 0.2}))
    assert row["spread"]["mean"] == 0.25
    assert row["line, integers kept: jumps"]["mean"] == 0.5
    (told,) = landscape.brief([row])
    assert set(told) == {"network", "block", "weights", "loss", "minima", "bends", "jumps", "spread"}


def test_a_block_with_one_scale_has_no_two_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape, "scale_keys", lambda *_: [])
    with pytest.raises(UsageError, match="at least 2 scales"):
        run()


def test_images_without_labels_stay_so() -> None:
    subject, _, _ = begun()
    assert isinstance(subject.held_out, Images)
    _, distances = measured_batches(subject, subject.held_out, 6, Run())
    assert distances.names == ("infonce", "mse", "cosine", "kl", "agreement")


def test_without_plotly_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'bitwright\[studies\]'"):
        next(iter(landscape.cells(None, landscape.STUDY.defaults)))  # type: ignore[arg-type]
