"""Recipes and plans of others: plain values of limited size, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.bits.plan import Plan
from bitwright.errors import UsageError
from bitwright.given.text import read_json, read_yaml
from bitwright.recipes import recipe

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
YAML: dict[str, bytes] = {
    "aliases of aliases": (BOMB + "name: x\nstages: [*a8]\n").encode(),
    "alias of itself": b"name: x\nstages: &a [*a]\n",
    "depth": b"stages: " + b"[" * 5000 + b"]" * 5000,
    "size": b"name: " + b"x" * (2 << 20),
    "latin": "name: caf\xe9\nstages: [calibrate]\n".encode("latin-1"),
    "utf-16": "name: x\nstages: [calibrate]\n".encode("utf-16"),
    "number as a key": b"name: x\nstages: [{calibrate: {1: 2}}]\n",
    "list as a key": b"? [1, 2]\n: x\n",
    "date": b"name: 2024-13-45\nstages: [calibrate]\n",
    "long number": b"name: x\nstages: [{calibrate: {score_probes: " + b"9" * 5000 + b"}}]\n",
    "tag": b"name: !!python/object/apply:os.mkdir [ran]\nstages: [calibrate]\n",
    "zero byte": b"name: x\0\nstages: [calibrate]\n",
    "nothing": b"",
    "two documents": b"name: x\n---\nname: y\n",
}


@pytest.mark.parametrize("case", YAML)
def test_recipe_that_is_none_is_refused_in_a_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(YAML[case])
    with pytest.raises(UsageError, match=r"mine\.yaml") as refused:
        recipe("mine.yaml")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert not Path("ran").exists()


def test_anchors_that_stay_small_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "import sys; sys.exit(3)", "RECIPE = unknown", "def (", "1/0"])
def test_recipe_in_python_that_fails_or_leaves(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match=r"mine\.py to run, it raised"):
        recipe(tmp_path / "mine.py")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"layers": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"[]", b"null"])
def test_plan_that_is_none_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"plan\.json"):
        Plan.read(tmp_path)


def test_json_of_an_editor_that_marks_the_order_of_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xef\xbb\xbf" + b'{"bits": 4}')
    assert read_json(tmp_path / "plan.json") == {"bits": 4}
