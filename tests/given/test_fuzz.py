"""Broken files of every kind that is read: read, or refused in one line. `make fuzz` tries 10,000, `make test` 500."""

from __future__ import annotations

import copy
import json
import lzma
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_files import node, weights, write
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import bitwright as bw
from bitwright.bits.plan import Plan
from bitwright.errors import BitwrightError
from bitwright.export.packed import LZMA
from bitwright.given.images import load_images
from bitwright.given.models import load_model
from bitwright.given.saved_program import load_program
from bitwright.given.weights import read_state_dict
from bitwright.quant.scheme import Rule
from bitwright.recipes import recipe
from bitwright.run import folder as run_folder

CASES = int(os.environ.get("BITWRIGHT_FUZZ", "500"))
SHARES = {
    "plan": 10,
    "recipe": 12,
    "rule": 10,
    "run": 10,
    "csv": 15,
    "npz": 10,
    "slice": 10,
    "packed": 15,
    "pt2": 8,
    "onnx": 10,
    "weights": 10,
}
ONNX: tuple[list[Any], dict[str, Any], tuple[Any, ...], int] = (
    [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Sigmoid", "c", "s"), node("Mul", "c s", "m"),
        node("Resize", "m - f", "r", mode="nearest"), node("Shape", "r", "z"), node("Slice", "z a b", "n"),
        node("Concat", "n l", "t", axis=0), node("Reshape", "r t", "v"), node("ReduceMean", "v", "q", axes=[-1]),
        node("Expand", "e t2", "p"), node("Add", "q p"),
    ],
    {
        "w": weights(4, 3, 3, 3), "f": np.asarray([1, 1, 2, 2], np.float32), "a": np.asarray([0]), "b": np.asarray([2]),
        "l": np.asarray([-1]), "e": weights(1, 1, 1), "t2": np.asarray([1, 4, 1]),
    },
    ("N", 3, 8, 8), 13,
)  # fmt: skip
IMAGES = torch.zeros(4, 3, 8, 8)
PLAN = {"layers": {"0": {"weight": {"bits": 4}, "activation": {"bits": 8}}}, "predicted": {"loss": 1.0}}


def tried(kind: str) -> Callable[[Any], Any]:
    """So many cases of a kind, the same ones each time."""
    count = max(1, CASES * SHARES[kind] // sum(SHARES.values()))
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, database=None, deadline=10_000, suppress_health_check=quiet)


def refused_or_read(read: Callable[[], object]) -> None:
    """Anything but an error of bitwright's in one line goes on as a failure."""
    said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except BitwrightError as error:
            said = str(error)
    assert said is None or (said.strip() and "\n" not in said and "fault of bitwright" not in said)


STRANGE = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x" * 300, "\0", "\ud800", [], {}, [[[]]], "../x"]
    ),
    st.integers(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 9), max_size=4),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in JSON."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


@st.composite
def twisted(draw: st.DrawFn, data: Any) -> Any:
    """JSON in which one to three values are others, or missing."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        if not path:
            data = copy.deepcopy(draw(STRANGE))
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(draw(STRANGE))
        else:
            del holder[path[-1]]
    return data


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, added or cut off."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(made)))
        made[start : start + draw(st.integers(0, 40))] = draw(st.binary(max_size=12))
    return bytes(made[: draw(st.integers(0, len(made)))] if draw(st.integers(0, 4)) == 0 else made)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 6), nn.Flatten()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bw.quantize(net, torch.randn(8, 3, 8, 8), "rtn")
    return model.save(tmp_path_factory.mktemp("fuzz") / "run")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, (nodes, stored, shape, opset) = tmp_path_factory.mktemp("fuzz") / "net.onnx", ONNX
    return write(path, nodes, shape, stored, opset=opset)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "net.pt2"
    torch.export.save(torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), (IMAGES,)), path)
    return path


def as_bytes(data: Any) -> bytes:
    return json.dumps(data).encode("utf-8", "surrogatepass")


@tried("plan")
@given(content=st.one_of(twisted(PLAN).map(as_bytes), damaged(as_bytes(PLAN)), st.binary(max_size=64)))
def test_plans(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    refused_or_read(lambda: Plan.read(tmp_path).scheme())


RECIPE = recipe("eptq").settings()


@tried("recipe")
@given(
    content=st.one_of(
        twisted(RECIPE).map(as_bytes),
        damaged(recipe("mse").to_yaml().encode()),
        st.text("ab:- &*![]{}\n\"'|>%@1,.~", max_size=60).map(str.encode),
    )
)
def test_recipes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    refused_or_read(lambda: recipe(tmp_path / "x.yaml"))


@tried("rule")
@given(text=st.one_of(st.text(max_size=20), st.text("a*.[]=w1a8floatz ", max_size=20)))
def test_rules(text: str) -> None:
    refused_or_read(lambda: Rule.parse(text))


@tried("csv")
@given(content=st.one_of(st.text("01,9-+\n\0\"'. ", max_size=40).map(str.encode), damaged(b"0,1\n1,2\n2,3\n3,0\n")))
def test_labels(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)

    def read() -> None:
        labels = load_images(IMAGES, None, labels=tmp_path / "x.csv").labels
        assert labels is not None
        assert len(labels) == 4
        assert bool((labels >= 0).all())

    refused_or_read(read)


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    kinds = st.sampled_from(["u1", "f4", "f8", "f2", "i8", "u8", "c8", "?", "U3"])
    shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    names = st.lists(st.sampled_from(["images", "labels", "x"]), max_size=3, unique=True)
    return {name: np.ones(draw(shapes), draw(kinds)) for name in draw(names)}


@tried("npz")
@given(found=arrays(), damage=st.booleans(), data=st.data())
def test_arrays(found: dict[str, Any], damage: bool, data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **found)
    if damage:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    how = bw.Preprocessing(input_size=(3, 4, 4))
    refused_or_read(lambda: load_images(path, how).batch([0]))


@tried("slice")
@given(text=st.one_of(st.text("0123456789:-+ []", max_size=24), st.text(max_size=12)))
def test_slices(text: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES.numpy())
    refused_or_read(lambda: load_images(f"{tmp_path}/x.npz[{text}]", None))


@tried("run")
@given(data=st.data())
def test_results(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    result = json.loads((run / "result.json").read_text())
    content = data.draw(st.one_of(twisted(result).map(as_bytes), damaged(as_bytes(result))))
    (folder / "result.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    refused_or_read(lambda: run_folder.read_result(folder))
    refused_or_read(lambda: bw.load(folder))


@tried("packed")
@given(data=st.data())
def test_packed_files(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    source, path = run / "model.safetensors", tmp_path / "model.safetensors"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(source.read_bytes())))
    else:
        with safe_open(source, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        structure = json.loads(lzma.decompress(tensors["structure"].numpy().tobytes(), lzma.FORMAT_RAW, filters=LZMA))
        text = as_bytes(data.draw(twisted(structure)))
        packed = bytearray(lzma.compress(text, lzma.FORMAT_RAW, filters=LZMA))
        version = data.draw(st.sampled_from(["1", "1", "1", "-1", "0", "x", "9" * 5000, "\u0661", ""]))
        save_file(tensors | {"structure": torch.frombuffer(packed, dtype=torch.uint8)}, path, {"bitwright": version})
    refused_or_read(lambda: bw.load(path))


@tried("weights")
@given(data=st.data(), legacy=st.booleans())
def test_checkpoints(data: st.DataObject, legacy: bool, tmp_path: Path) -> None:
    """Of the newer form the bytes are damaged that name objects, and not the archive around them."""
    path, state = tmp_path / "x.pt", {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    content = {"best": np.float64(0.5), "out": Path("runs"), "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    else:
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, held in members.items():
                new.writestr(name, data.draw(damaged(held)) if name.endswith("data.pkl") else held)
    refused_or_read(lambda: read_state_dict(path))


@tried("pt2")
@given(data=st.data())
def test_saved_programs(data: st.DataObject, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(archive.read_bytes())))
    else:
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
            changed = data.draw(st.sampled_from([n for n in old.namelist() if n.endswith(".json")]))
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, as_bytes(data.draw(twisted(json.loads(content)))) if name == changed else content)
    refused_or_read(lambda: load_program(path))


@tried("onnx")
@given(st.data())
def test_onnx_files(network: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(data.draw(damaged(network.read_bytes())))
    refused_or_read(lambda: load_model(str(path)))
