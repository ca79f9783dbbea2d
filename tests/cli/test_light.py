"""Commands that read files alone answer at once: they do not import PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.cli.recipes import SETTINGS, ListedRecipe, listed_recipes
from bitwright.recipes import DEFAULT, builtin_recipes

RUN = """
import sys
from bitwright.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "scipy", "onnx", "onnxruntime", "PIL"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else status)
"""


@pytest.fixture
def run(here: Path) -> Path:
    """The finished run of all these tests."""
    return here / "run"


def called(*given: str) -> str:
    done = subprocess.run([sys.executable, "-c", RUN, *given], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_a_run_or_the_recipes_imports_no_library_of_networks(run: Path) -> None:
    shown = json.loads(called("inspect", str(run), "--json"))
    result = json.loads((run / "result.json").read_text())
    assert shown["layers"] == result["layers"]
    assert shown["size"] == result["size"]
    (run / "report.html").unlink()
    called("report", str(run))
    assert (run / "report.html").is_file()
    assert "eptq (default)" in called("recipes")
    assert called("recipes", "eptq") == builtin_recipes()["eptq"].to_yaml()


def test_a_run_is_shown_alike_from_its_result_and_from_its_network(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "run"]) == 0
    light = capsys.readouterr().out
    assert main(["inspect", "run", "--blocks"]) == 0
    whole = capsys.readouterr().out
    start, end = whole.index("Blocks"), whole.rindex("\nrun ") + 1
    assert whole[:start] + whole[end:] == light


def test_a_damaged_network_is_found_without_reading_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(kept[:-1] + b"\x00\x01")
    assert main(["inspect", str(run)]) == 2
    assert "damaged or was changed" in capsys.readouterr().err


def test_the_list_is_that_of_the_recipes() -> None:
    there = builtin_recipes().values()
    assert list(listed_recipes()) == [ListedRecipe(r.name, r.summary, r.paper, r.name == DEFAULT) for r in there]


def test_the_settings_that_are_written_down_are_those_of_the_recipes() -> None:
    written = json.loads(SETTINGS.read_text(encoding="utf-8"))
    there = {name: made.settings() for name, made in builtin_recipes().items()}
    assert json.dumps(written) == json.dumps(there), "write them anew: python -m bitwright.cli.recipes"


def test_what_a_run_leaves_out_is_what_was_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "short"
    call = ["quantize", "models.py:Net", "photos", "--recipe", "rtn", "--out", str(folder)]
    assert main([*call, "--check", "some"]) == 2
    assert "'full', 'fast' as --check, found 'some'" in capsys.readouterr().err
    assert main([*call, "--no-report", "--no-diagnosis", "--check", "fast"]) == 0
    shown = capsys.readouterr()
    assert {p.name for p in folder.iterdir()} >= {"model.onnx", "result.json"}
    assert not {"report.html", "report.json"} & {p.name for p in folder.iterdir()}
    result = json.loads((folder / "result.json").read_text())
    assert result["parity"]["images"] == 3
    assert "diagnosis" not in {*result, *result["seconds"]}
    assert "Looking for what was lost" not in shown.err
    longest = max((v, k) for k, v in result["seconds"].items() if k != "total")[1]
    assert f"{longest} " in shown.out.split(" time ")[1]


COLLECTED = """
import atexit, gc, sys
from bitwright.cli import main
atexit.register(lambda: print(len(gc.get_objects()), file=sys.stderr))
for _ in range(2):
    main(["recipes"])
    print(gc.isenabled(), gc.get_freeze_count(), file=sys.stderr)
kept = [[] for _ in range(1000)]
"""


def test_what_a_verb_imports_is_looked_through_for_cycles_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTED], check=True, capture_output=True, text=True)
    (on, first), (still_on, again), (left,) = (line.split() for line in done.stderr.splitlines()[-3:])
    assert on == still_on == "True"
    assert 1000 < int(again) <= int(first)  # the second call imports nothing
    assert int(left) < 1000  # when the process ends
