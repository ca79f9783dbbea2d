"""The benchmark of networks: its blocks are cut and filled as it says, and its page leaves nothing out."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import coverage, coverage_networks

DONE = {
    "network": "timm:a",
    "commit": "abc",
    "stage": "done",
    "pixels": 128,
    "parameters": 1_234_567,
    "cut": 3,
    "seconds": 12.4,
    "peak_memory_bytes": 900_000_000,
    "unfolded": 2,
    "sqnr": 31.25,
    "file_db": 42.0,
    "agreement": 0.75,
    "itself_db": 45.0,
    "itself_agreement": 0.875,
}
FAILED = {"network": "torchvision:b", "stage": "export", "seconds": 3.0, "peak_memory_bytes": 8e8, "sqnr": 20.0}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.norm(self.conv(x)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    wide = nn.Sequential(*(Block(8) for _ in range(5)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), wide, nn.ReLU()).eval()


def test_equal_blocks_are_cut_to_two_and_bare_layers_are_not():
    model = network()
    assert coverage_networks.cut(model, 2) == 3
    assert [len(model), len(model[4])] == [6, 2]
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)


def test_blocks_of_other_shapes_or_strides_are_kept():
    model = nn.Sequential(Block(8), Block(8), Block(8), Block(4), Block(4), Block(4))
    model[1].conv.stride = (2, 2)
    assert coverage_networks.cut(model, 1) == 3
    assert [(b.conv.in_channels, b.conv.stride) for b in model] == [(8, (1, 1)), (8, (2, 2)), (4, (1, 1))]


def test_what_an_initialisation_leaves_constant_is_filled_with_the_same_values_each_time():
    images = coverage_networks.smooth_images(4, 16)
    models = [network(), network()]
    with torch.no_grad():
        for model in models:
            coverage_networks.fill(model, images)
        found = [model(images) for model in models]
    assert torch.equal(*found)
    block = models[0][4][0]
    assert 0.2 <= float(block.scale.detach().min()) < float(block.scale.detach().max()) <= 0.5
    assert float((block.norm.running_mean.abs() > 1e-3).float().mean()) > 0.5
    assert not block.norm.training
    assert block.norm.momentum == 0.1
    shifted = float((found[0] - found[0].mean(0)).square().sum() / found[0].square().sum())
    assert shifted > 0.05, "the output must depend on the image"


def test_images_are_seeded_and_smooth():
    images = coverage_networks.smooth_images(3, 64)
    assert torch.equal(images, coverage_networks.smooth_images(3, 64))
    steps = (images[..., 1:] - images[..., :-1]).square().mean()
    assert float(steps) < 0.5 * 2 * float(images.var())  # of white noise: twice the variance


def test_the_page_has_a_line_for_each_network_and_counts_the_done(monkeypatch):
    monkeypatch.setattr(coverage_networks, "names", lambda: ["timm:a", "torchvision:b", "transformers:c"])
    failed = FAILED | {"error": "Expected one thing | found\nanother."}
    text = coverage.page({"hardware": "a CPU", "software": "timm 1", "coverage": {"results": [DONE, failed]}})
    assert "Measured on a CPU, with timm 1: 1 rows by `abc`." in text
    assert "| `a` | 128 | 1.2 M | 3 | 12 | 0.9 GB | 2 | 31.2 dB | 42.0 dB | 45.0 dB | 75 % / 88 % |  |" in text
    assert "| **not done** (export): Expected one thing \\| found another. |" in text
    assert "| timm | 1 | 1 | 1 | 1 |" in text
    assert "| torchvision | 1 | 1 | 1 | 0 |" in text
    assert "| transformers | 1 | 0 | 0 | 0 |" in text
    assert re.search(r"\| `c` \|[ |]*not tried yet \|", text)


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ({"image_db": 6.0, "wide_db": 9.0}, "Random weights: the float network keeps 6 dB"),
        ({"image_db": 41.0, "wide_db": 31.8}, "Activations: 32 dB with 16 bits"),
    ],
)
def test_a_low_ratio_is_explained_by_what_was_measured(why, said):
    assert coverage.note(DONE | {"sqnr": 5.0, "why": why}).startswith(said)
    assert coverage.note(DONE) == ""


def fails():
    raise ValueError("first line\nsecond line")


def runs_for_ever():
    while True:
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside the threads of pytest-xdist
@pytest.mark.parametrize(
    ("does", "said"),
    [(runs_for_ever, "not finished in 0.3 s"), (lambda: os._exit(7), "exit code 7"), (fails, "ValueError: first line")],
)
def test_a_network_that_fails_or_breaks_its_process_or_its_time_is_a_row(does, said, monkeypatch):
    def stages(name):
        yield "quantize", {"pixels": 32}
        does()

    monkeypatch.setattr(coverage, "stages", stages)
    monkeypatch.setattr(coverage, "_import_libraries", lambda: None)
    rows = list(coverage.measured(["timm:a", "timm:b"], 0.3, jobs=2))
    assert sorted(row["network"] for row in rows) == ["timm:a", "timm:b"]
    for row in rows:
        assert (row["stage"], row["error"], row["pixels"]) == ("quantize", said, 32)
        assert row["peak_memory_bytes"] > 1e6
        assert "**not done** (quantize)" in coverage.note(row)


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "rows.json"
    assert coverage.rows_of(coverage.read(path)) == {}
    coverage._write({"timm:a": DONE}, path)
    assert coverage.rows_of(coverage.read(path)) == {"timm:a": DONE}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_no_network_is_tried_twice_and_each_names_its_library():
    names = coverage_networks.names()
    assert len(names) == len(set(names)) > 140
    assert all(re.fullmatch(r"(timm|torchvision|transformers):\w+", name) for name in names)


def test_the_published_page_is_that_of_the_published_rows():
    (found,) = (Path(coverage.__file__).parent / "results").glob("*-coverage-cpu.json")
    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.page(coverage.read(found))
