"""The commands and the Python of the documentation run, on small networks and with small budgets."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import bitwright as bw
from bitwright.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

NETWORK = f"{ROOT / 'examples' / 'own_model.py'}:small_net"
"""A network that takes what the embedded ones take, for a fraction of their time."""

NOT_HERE = {
    "bitwright quantize timm:tf_efficientnet_lite0@weights.pt": "its weights are not in the repository",
    "bitwright study gradual timm:resnet18@weights.pt": "its weights are not in the repository",
    "bitwright quantize MODEL IMAGES --recipe percentile": "the recipe is the page's own example",
    "bitwright quantize torchvision:retinanet_resnet50_fpn@retinanet.pth": "its weights are not in the repository",
    "bitwright evaluate retinanet/model.onnx": "it is the file of the one above",
    "bitwright evaluate RUN images --float net.py:build": "the network is the page's own example",
}
"""How commands begin that cannot run here, and why."""

STANDS_FOR: dict[str, tuple[str, ...]] = {
    "MODEL": ("zoo:fashion_cnn",),
    "IMAGES": ("zoo:fashion[:16]",),
    "TEST": ("photos",),
    "RUN": ("first",),
    "NAME": ("mse",),
    "…": ("zoo:fashion_cnn", "zoo:fashion[:16]"),
    "zoo:fashion": ("zoo:fashion[:16]",),
    "zoo:fashion[:64]": ("zoo:fashion[:16]",),
    "zoo:fashion-test": ("zoo:fashion-test[:64]",),
    "zoo:scenes": ("zoo:scenes[:8]",),
    "zoo:scenes-masks": ("zoo:scenes-masks[:6]",),
    "zoo:scenes-boxes": ("zoo:scenes-boxes[:6]",),
    "zoo:fashion-test[:2000]": ("zoo:fashion-test[:64]",),
    "photos[1::2]": ("photos",),
    "runs/…/model.onnx": ("runs/first/model.onnx",),
    "plan.json": ("first/plan.json",),
    "a,b,c": ("rtn,mse",),
    "conv_stem=w8": ("stem.conv=w8",),
    "NAME=AXIS": ("output=1",),
}
"""Words of the pages, and what they are here."""

SMALLER = {word: (NETWORK, *STANDS_FOR.get(word, ())[1:]) for word in ("zoo:fashion_cnn", "MODEL", "…")}
"""Of commands that are not slow: a network that is quantized and written in no time."""
OF_ITS_OWN = ("--plan", "--rule", "generic-pot")
"""What makes a command name layers of the network on its page."""

SMALL: dict[str, dict[str, str]] = {
    "quantize": {"--steps": "2"},
    "compare": {"--steps": "2"},
    "demo": {"--recipe": "mse"},
    "plan": {"--samples": "8"},
    "sensitivity": {"--samples": "8", "--probes": "2", "--steps": "6", "--spectrum-samples": "4"},
    "study": {"--steps": "2", "--samples": "16", "--seeds": "0"},
    "bench": {"--seconds": "0.5"},
    "parity": {"--samples": "4"},
}
"""Budgets of each verb; they take the place of what a page says."""

QUICK = {"inspect", "report", "recipes", "evaluate", "doctor"}
SHORT = ("--recipe m", "--dry-run", "generic-pot")
"""What makes a command of `quantize` quick."""
RECIPES = {"mse", "rtn", "optq", "my_recipe.yaml"}
"""That take no steps."""


@dataclass(frozen=True)
class Call:
    """A command as a page has it."""

    page: str
    line: str
    error: str = ""
    """That the page shows below it."""

    @property
    def verb(self) -> str:
        """The second word."""
        return self.line.split()[1]

    @property
    def slow(self) -> bool:
        """Whether it is left to the slow tests."""
        return self.verb not in QUICK and not (self.verb == "quantize" and any(x in self.line for x in SHORT))


def calls() -> list[Call]:
    """Every one in a block of code, and those in the text that name what they work on; each once."""
    found: dict[str, Call] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            for line, below in zip(lines, [*lines[1:], ""], strict=True):
                line = re.sub(r"\s+#.*$", "", line.removeprefix("$ ").strip())
                if line.startswith("bitwright "):
                    error = below.removeprefix("error: ") if below.startswith("error: ") else ""
                    found.setdefault(line, Call(page.name, line, error))
        for line in re.findall(r"`(bitwright \w[^`]*\b(?:MODEL|RUN|zoo:|examples/|runs/)[^`]*)`", text):
            if "…" not in line:
                found.setdefault(line, Call(page.name, line))
    return list(found.values())


def here(call: Call) -> tuple[list[str], str | None]:
    """The words to run, and the file that the output goes to."""
    line, _, output = call.line.partition(" > ")
    words: list[str] = []
    stands_for = STANDS_FOR if call.slow or any(x in line for x in OF_ITS_OWN) else {**STANDS_FOR, **SMALLER}
    for word in shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line))[1:]:
        if words[:1] == ["evaluate"] and word == "IMAGES":  # with labels: this run, of Python code, follows no network
            word = "zoo:fashion-test[:2000]"
        words += stands_for.get(word, (str(ROOT / word) if word.startswith("examples/") else word,))
    for option, value in SMALL.get(words[0], {}).items():
        if option == "--steps" and words[0] == "quantize" and _takes_no_steps(words):
            continue
        if option in words:
            words[words.index(option) + 1] = value
        elif option in _options(words[0]):
            words += [option, value]
    return words, output.strip() or None


def _takes_no_steps(words: list[str]) -> bool:
    given = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    return given in RECIPES or "--dry-run" in words


def _options(verb: str) -> set[str]:
    from typer.main import get_command

    from bitwright.cli import app

    group: Any = get_command(app)
    return {name for p in group.commands[verb].params for name in p.opts}


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that pages suppose: runs under the names that they use, photos with labels, a recipe."""
    place = tmp_path_factory.mktemp("supplies")
    with _inside(place):
        photos = place / "photos"
        photos.mkdir()
        rows = []
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (8, 28, 28), dtype=np.uint8)):
            Image.fromarray(pixels).save(photos / f"{i}.png")
            rows.append(f"{i}.png,{i}")
        files = [{"bytes": (photos / f"{i}.png").read_bytes(), "path": None} for i in range(8)]
        pq.write_table(pa.table({"image": files, "labels": list(range(8))}), place / "train.parquet")
        (place / "labels.csv").write_text("file,class_index\n" + "\n".join(rows) + "\n")
        made = ["quantize", NETWORK, "zoo:fashion[:16]", "--recipe", "mse", "--weights", "4"]
        assert main([*made, "--evaluate", "zoo:fashion-test[:16]", "--no-images", "--out", "first"]) == 0
        bw.quantize("zoo:fashion_cnn", "zoo:fashion[:4]", "rtn", weights=4).save("planned")
        shutil.move("planned/plan.json", "first/plan.json")  # which pages give to that network
        assert main(["recipes", "mse"]) == 0
        (place / "my_recipe.yaml").write_text(bw.recipes.recipe("mse").to_yaml())
        for name in ("second", "runs/first", "runs/second", "demo/fashion_cnn", "runs/tf_efficientnet_lite0-eptq-w4a8"):
            shutil.copytree(place / "first", place / name)
    return place


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def place(supplies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the supplies, and the working folder."""
    shutil.copytree(supplies, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "scores"))
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path


def not_here(call: Call) -> str | None:
    """Why a command cannot run here."""
    return next((why for start, why in NOT_HERE.items() if call.line.startswith(start)), None)


RUN = [
    pytest.param(c, id=f"{c.page}: {c.line[10:90]}", marks=[pytest.mark.slow] if c.slow else [])
    for c in calls()
    if not_here(c) is None
]


MODEL_FILE = """
import torch
from torch import nn

PREPROCESSING = {"input_size": (3, 16, 16), "mean": 0.5, "std": 0.5}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
"""


def supply(call: Call, place: Path) -> None:
    """What single commands suppose besides: a run for their runtime, a network of the user's own, folders of images."""
    for runtime in ("tensorrt", "executorch"):
        if f"--to {runtime}" in call.line:
            made = ["quantize", NETWORK, "zoo:fashion[:8]", "--recipe", "rtn", "--runtime", runtime]
            assert main([*made, "--no-report", "--force", "--out", "first"]) == 0
    if "model.py:net" in call.line or "model.onnx images/" in call.line:
        for folder in ("train/a", "train/b", "images"):
            (place / folder).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(place / folder / f"{i}.png")
        (place / "model.py").write_text(MODEL_FILE)
    if "model.onnx images/" in call.line:
        space: dict[str, Any] = {}
        exec(MODEL_FILE, space)
        example = (torch.zeros(1, 3, 16, 16),)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(space["net"](), example, str(place / "model.onnx"), dynamo=True, verbose=False)


@pytest.mark.real_default
@pytest.mark.parametrize("call", RUN)
def test_a_command_of_the_documentation_runs(call: Call, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, output = here(call)
    supply(call, place)
    if "openvino" in words and importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed: pip install 'bitwright[openvino]'")
    if "executorch" in words and importlib.util.find_spec("executorch") is None:
        pytest.skip("ExecuTorch is not installed: pip install executorch")
    if "--out" in words:
        target = place / words[words.index("--out") + 1]
        if target.is_dir():
            shutil.rmtree(target)
    if words[0] == "demo":
        shutil.rmtree(place / "demo")
    capsys.readouterr()
    code = main(words)
    said = capsys.readouterr()
    if call.error:
        assert code == 2
        assert call.error in said.err
        return
    assert code == 0, said.err[-1500:]
    if output is not None:
        (place / output).write_text(said.out)
        assert bw.recipes.recipe(place / output).name == words[1]


def test_most_commands_run_and_each_exception_is_on_a_page() -> None:
    found = calls()
    assert len(RUN) > 35
    for start in NOT_HERE:
        assert any(c.line.startswith(start) for c in found), start
    assert sum(not_here(c) is not None for c in found) <= len(found) // 10


# ------------------------------------------------------------------------------------------------------- Python

SUPPOSED = """
import bitwright as bw
model, images, test_images = NETWORK, "zoo:fashion[:16]", "zoo:fashion-test[:32]"
"""
ELSEWHERE = {"deploy.md"}
"""Pages whose Python another test runs."""


def blocks() -> dict[str, list[str]]:
    """The Python of every page, block after block, by its name."""
    found = {}
    for page in PAGES:
        each = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if each and page.name not in ELSEWHERE:
            found[page.name] = each
    return found


class Rows:
    """A data set as the package `datasets` gives it: rows by number, each a dict, with pictures decoded."""

    def __init__(self, split: str) -> None:
        self.pixels = np.random.default_rng(len(split)).integers(0, 255, (12, 40, 40, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.pixels[index]), "image_file_path": f"{index}.jpg", "labels": index % 3}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the package `datasets`, which downloads what it gives."""
    package: Any = types.ModuleType("datasets")
    package.load_dataset = lambda name, split: Rows(split)
    monkeypatch.setitem(sys.modules, "datasets", package)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # of what PyTorch's exporter does
@pytest.mark.filterwarnings("ignore:100 images were asked for, there are 12:UserWarning")
@pytest.mark.parametrize("page", blocks())
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, place: Path, hub: None) -> None:
    names: dict[str, Any] = {"NETWORK": NETWORK}
    exec(SUPPOSED, names)  # the names that a page takes for granted
    for number, block in enumerate(blocks()[page], 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert set(names) > {"bw", "model"}


@pytest.mark.parametrize("network", [NETWORK, pytest.param("zoo:fashion_cnn", marks=pytest.mark.slow)])
def test_the_notebook_runs_from_top_to_bottom(network: str, place: Path) -> None:
    notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "figures of one machine stay out"
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells, 1):
        cell = cell.replace("zoo:fashion_cnn", network).replace("[:256]", "[:32]").replace("[:1000]", "[:64]")
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["scores"].shape == (4, 10)
    assert Path("run/report.html").is_file()


def test_pages_with_python_are_seen() -> None:
    assert set(blocks()) >= {"README.md", "CONTRIBUTING.md", "own-network.md", "plans.md", "report.md"}
