"""Saved programs run with PyTorch alone, at any batch size, and equal the simulation bit for bit."""

import json
import subprocess
import sys
import zipfile

import cases
import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.export.packed import ideal_bytes
from bitwright.export.pt2 import NOTE, Integers, pack, unpack, write_pt2
from bitwright.graph.capture import capture
from bitwright.quant.quantizer import Frozen

ALONE = """
import sys
sys.modules["bitwright"] = None  # importing it fails
import torch
program = torch.export.load(sys.argv[1]).module()
found = program(torch.load(sys.argv[2], weights_only=True))
torch.save(found, sys.argv[3])
assert not any(name.startswith("bitwright.") for name in sys.modules)
"""


def quantized(name, **settings):
    return bw.quantize(cases.model(name), cases.dataset(), recipe="rtn", scheme=bw.Scheme(**settings))


def test_a_program_runs_without_bitwright_at_another_batch_size(tmp_path):
    model = quantized("transformer", weights=4)
    parity = write_pt2(model, tmp_path / "m.pt2", cases.images(4))
    assert parity.passed
    assert parity.batch_sizes == (1, 3)
    images = cases.images(7, seed=5)
    torch.save(images, tmp_path / "in.pt")
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE]
    subprocess.run([*command, *(tmp_path / n for n in ("m.pt2", "in.pt", "out.pt"))], check=True)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("residual", {"weights": 8}),
        ("residual", {"weights": 3, "activations": 5}),
        ("transformer", {"weights": 2, "activations": "float"}),
        ("transformer", {"weights": 5, "granularity": "group", "group_size": 3}),
        ("transposed", {"weights": 4, "activations": 16}),
        ("squeeze_excite", {"weights": 4, "runtime": "generic-pot"}),
    ],
)
def test_programs_equal_the_simulation_bit_for_bit(name, settings, tmp_path):
    parity = write_pt2(quantized(name, **settings), tmp_path / "m.pt2", cases.images(6))
    assert parity.max_abs == 0.0
    assert parity.agreement == 1.0


def test_a_program_that_computes_something_else_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(Integers, "forward", lambda self: torch.zeros(self.shape))
    parity = write_pt2(quantized("residual"), tmp_path / "m.pt2", cases.images(6))
    assert not parity.passed
    assert parity.first_divergence == "the output"


def test_weights_are_stored_in_few_bits(tmp_path):
    for bits, width in ((2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        model = quantized("residual", weights=bits).freeze()
        for frozen in model.graph.modules():
            if isinstance(frozen, Frozen) and frozen.codes.dtype == torch.int16:
                stored = Integers(frozen)
                assert stored.codes.dtype == torch.uint8
                assert stored.codes.numel() == -(-frozen.codes.numel() * width // 8)
                assert torch.equal(stored(), frozen())
                assert stored().stride() == frozen().stride()


def test_integers_are_packed_as_numpy_unpacks_them():
    codes = torch.randint(0, 16, (37,), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, 4).numpy()
    assert np.array_equal(np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:37], codes.numpy())
    for width in (2, 4, 8):
        codes = torch.randint(0, 1 << width, (13,), generator=torch.Generator().manual_seed(width))
        assert torch.equal(unpack(pack(codes, width), width)[:13].long(), codes)


@pytest.mark.slow
def test_the_archive_tells_how_it_was_made_and_nothing_of_the_machine(tmp_path):
    model = bw.quantize("zoo:fashion_cnn", "zoo:fashion[:8]", recipe="rtn", weights=4)
    write_pt2(model, tmp_path / "m.pt2", model.calibration.batch(range(3)))
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        names = archive.namelist()
        note = json.loads(archive.read(next(n for n in names if n.endswith(NOTE))))
        text = b"".join(archive.read(n) for n in names if n.endswith(".json"))
    assert note["bitwright"] == bw.__version__
    assert note["recipe"]["name"] == "rtn"
    assert note["bits"] == {"weights": 4, "activations": 8}
    assert b"site-packages" not in text
    assert str(tmp_path).encode() not in text
    assert ideal_bytes(model) < (tmp_path / "m.pt2").stat().st_size < 2 * ideal_bytes(model)


def test_the_same_network_is_the_same_file(tmp_path):
    model = quantized("residual", weights=4)
    for name in ("a.pt2", "b.pt2"):
        write_pt2(model, tmp_path / name, cases.images(3))
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_a_program_is_a_model_again(tmp_path):
    model = quantized("residual", weights=4)
    write_pt2(model, tmp_path / "m.pt2", cases.images(3))
    captured = capture(torch.export.load(tmp_path / "m.pt2"), cases.images(2))
    with torch.no_grad():
        assert torch.equal(next(iter(captured.graph(cases.images(5)))), model.flat(cases.images(5))[0])
