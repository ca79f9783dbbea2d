"""`bitwright inspect --blocks`, called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import dataset, make

import bitwright
from bitwright.cli import main


def test_blocks_of_a_float_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:fashion_vit", "--blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    blocks = found["blocks"]
    assert [b["kind"] for b in blocks] == ["chain", *["attention", "mlp"] * 4, "chain"]
    assert blocks[1]["name"] == "blocks.0.attn"
    assert blocks[1]["layers"] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    rows = {r["name"]: r for r in found["layers"]}
    for block in blocks:
        assert block["parameters"] == sum(rows[n]["parameters"] for n in block["layers"])
        assert block["macs"] == sum(rows[n]["macs"] for n in block["layers"])


def test_blocks_are_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:fashion_cnn", "--blocks"]) == 0
    shown = capsys.readouterr().out
    assert "Blocks" in shown
    assert "stage1.1 " in shown
    assert "residual" in shown


def test_blocks_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(bitwright.quantize(make("transformer"), dataset(), recipe="rtn").save(tmp_path / "run"))
    assert main(["inspect", run, "--blocks", "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [(b["kind"], b["layers"]) for b in blocks] == [
        ("chain", ["patches"]),
        ("attention", ["attention.qkv", "attention.proj"]),
        ("mlp", ["mlp.0", "mlp.2"]),
        ("chain", ["head"]),
    ]
    assert blocks[2]["parameters"] == (8 * 12 + 12) + (12 * 8 + 8)
    assert blocks[2]["macs"] == 5 * (8 * 12 + 12 * 8)
    assert main(["inspect", run, "--json"]) == 0
    assert "blocks" not in json.loads(capsys.readouterr().out)
