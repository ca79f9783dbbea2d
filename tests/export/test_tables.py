"""Tables hold the whole network: it is rebuilt from the two files alone, and its layers are computed by hand."""

import json

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bitwright as bw
from bitwright.export.reference import run_reference
from bitwright.export.tables import fixed_point, read_tables, write_tables


def same_codes(model, again, images, runtime):
    ours, theirs = run_reference(model, images, runtime), run_reference(again, images, runtime)
    assert len(ours.layers) > 1
    assert ours.layers.keys() == theirs.layers.keys()
    for name, layer in ours.layers.items():
        assert torch.equal(layer.codes, theirs.layers[name].codes), name
        assert layer.kernel == theirs.layers[name].kernel
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights", [4, 8])
@pytest.mark.parametrize("name", ["zoo:fashion_cnn", "zoo:fashion_vit"])
def test_the_zoo_from_its_two_files_has_every_code_of_the_reference(name, weights, tmp_path):
    model = bw.quantize(name, "zoo:fashion[:8]", "rtn", weights=weights).freeze()
    images = model.calibration.batch(range(4))
    write_tables(model, tmp_path / "tables.json", images)
    again = read_tables(tmp_path / "tables.json")
    for runtime in ("onnxruntime", "generic"):
        same_codes(model, again, images, runtime)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("transposed", {"weights": 3, "granularity": "group", "group_size": 3}),
        ("transformer", {"activations": 16, "granularity": "head"}),
        ("squeeze_excite", {"runtime": "generic-pot"}),
        ("shifted_window", {"runtime": "tensorrt"}),
    ],
)
def test_every_setting_comes_back(name, settings, tmp_path):
    model = bw.quantize(cases.model(name), cases.dataset(), "rtn", scheme=bw.Scheme(**settings)).freeze()
    assert write_tables(model, tmp_path / "tables.json", cases.images(4)).passed
    same_codes(model, read_tables(tmp_path / "tables.json"), cases.images(4), "generic")


def test_convolutions_by_hand_from_the_numbers_of_the_table(tmp_path):
    """Sums of integers, times the multiplier, plus the zero point: the codes of the reference."""
    model = bw.quantize("zoo:fashion_cnn", "zoo:fashion[:8]", "rtn", weights=4).freeze()
    images = model.calibration.batch(range(2))
    write_tables(model, tmp_path / "tables.json", images)
    entries = {e["name"]: e for e in json.loads((tmp_path / "tables.json").read_text())["operators"]}
    arrays = np.load(tmp_path / "tables.npz")
    codes = {n: x.codes.numpy().astype(np.int64) for n, x in run_reference(model, images).layers.items()}
    checked = 0
    for entry in entries.values():
        if "multiplier" not in entry or entries[entry["inputs"]["input"]]["is"] != "quantize":
            continue
        given, weight, bias = (entries[entry["inputs"][k]] for k in ("input", "weight", "bias"))
        x = codes[given["name"]] - arrays[given["zero_point"]]
        w = arrays[weight["codes"]].astype(np.int64) << weight["shift"]
        extent = {k: entry["attributes"].get(k, d) for k, d in (("stride", 1), ("padding", 0), ("groups", 1))}
        sums = F.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double(), **extent).numpy()
        sums = sums + arrays[bias["codes"]].reshape(-1, 1, 1)
        end = entries[entry["requantizes_to"]]
        found = sums.astype(np.float32) * arrays[entry["multiplier"]].reshape(-1, 1, 1)
        found = np.clip(np.rint(found) + arrays[end["zero_point"]], *entry["clamp"])
        assert np.array_equal(found, codes[end["name"]]), entry["name"]
        shift = arrays[entry["multiplier_shift"]].astype(np.float64)
        assert np.array_equal(arrays[entry["multiplier_integer"]] / 2.0**shift, arrays[entry["multiplier"]])
        checked += 1
    assert checked > 20


def test_a_fixed_point_number_is_the_float():
    values = np.array([1.0, 0.3, 2.0**-40, 7.25, 1e-6], np.float32)
    integer, shift = fixed_point(values)
    assert integer.dtype == np.int32
    assert np.array_equal(integer / 2.0**shift, values)


def test_tables_that_are_none_or_name_what_does_not_exist(tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn").freeze()
    path = tmp_path / "tables.json"
    write_tables(model, path, cases.images(3))
    table = json.loads(path.read_text())
    operator = next(e for e in table["operators"] if e["is"] == "operator")
    for change in ({"operator": "aten.nothing.default"}, {"operator": "os.system"}, {"attributes": {"other": 1}}):
        kept = dict(operator)
        operator.update(change)
        path.write_text(json.dumps(table))
        with pytest.raises(bw.UsageError, match=r"nothing|os\.system|other"):
            read_tables(path)
        operator.update(kept)
    (tmp_path / "tables.npz").write_bytes(b"nothing")
    path.write_text(json.dumps(table))
    with pytest.raises(bw.UsageError, match="Expected tables of bitwright"):
        read_tables(path)


def test_the_same_network_is_the_same_two_files(tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn").freeze()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tables(model, tmp_path / name / "tables.json", cases.images(3))
    for file in ("tables.json", "tables.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
