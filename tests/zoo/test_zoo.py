import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from bitwright import zoo
from bitwright.errors import DataError, ModelError
from bitwright.zoo.fashion import read_split
from bitwright.zoo.train import main, normalized, stored

FOLDER = Path(zoo.__file__).parent
NAMES = sorted(zoo.NETWORKS)
SLICE = 1000


def metadata(name: str) -> dict[str, str]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def hashes(images: np.ndarray) -> set[str]:
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in images}


@pytest.mark.parametrize("name", NAMES)
def test_network_is_ready_for_inference(name: str) -> None:
    model = zoo.network(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.zeros(3, *zoo.preprocessing(name)["input_size"])).shape == (3, 10)


@pytest.mark.parametrize("name", NAMES)
def test_slice_agrees_with_the_stated_accuracy(name: str) -> None:
    """The interval is four binomial standard errors of a slice of that size."""
    stated = float(metadata(name)["test_top1"])
    images, labels = zoo.images("fashion-test")
    assert labels is not None
    with torch.no_grad():
        found = zoo.network(name)(normalized(images[:SLICE], name)).argmax(1).numpy()
    error = math.sqrt(stated * (1 - stated) / SLICE)
    assert abs((found == labels[:SLICE]).mean() - stated) < 4 * error


@pytest.mark.parametrize(("name", "least"), [("fashion_cnn", 0.92), ("fashion_vit", 0.89)])
def test_stated_accuracy_is_high_enough(name: str, least: float) -> None:
    facts = metadata(name)
    assert facts["name"] == name
    assert facts["test_images"] == "10000"
    assert "MIT" in facts["data"]
    assert float(facts["test_top1"]) >= least


@pytest.mark.parametrize("name", NAMES)
def test_export_with_a_dynamic_batch(name: str) -> None:
    model = zoo.network(name)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x), model(x))


def test_cnn_has_what_quantization_stumbles_over() -> None:
    modules = list(zoo.network("fashion_cnn").modules())
    for kind in (nn.SiLU, nn.Hardswish, nn.ReLU6, nn.BatchNorm2d):
        assert any(isinstance(m, kind) for m in modules)
    assert any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in modules)


def test_images() -> None:
    calibration, none = zoo.images("fashion")
    test, labels = zoo.images("fashion-test")
    assert none is None
    assert labels is not None
    assert calibration.shape == (1024, 28, 28, 1)
    assert test.shape == (10000, 28, 28, 1)
    assert calibration.dtype == test.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [1000] * 10


def test_calibration_has_no_labels_and_no_test_image() -> None:
    with np.load(FOLDER / "fashion_calibration.npz") as archive:
        assert archive.files == ["images"]
    assert not hashes(zoo.images("fashion")[0]) & hashes(zoo.images("fashion-test")[0])


def test_normalized_images_are_centred() -> None:
    x = normalized(zoo.images("fashion")[0], "fashion_cnn")
    assert x.shape == (1024, 1, 28, 28)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_stored_weights_lose_nothing_when_stored_again(name: str) -> None:
    model = zoo.network(name)
    for key, value in stored(model).items():
        assert torch.equal(value.to(model.state_dict()[key].dtype), model.state_dict()[key]), key


def test_file_sizes() -> None:
    for name in NAMES:
        assert (FOLDER / f"{name}.safetensors").stat().st_size <= 1_000_000
    shipped = [*FOLDER.glob("*.safetensors"), *FOLDER.glob("*.npz")]
    assert sum(path.stat().st_size for path in shipped) <= 6_600_000
    assert "Zalando" in (FOLDER / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match="Did you mean fashion_cnn"):
        zoo.network("fashion-cnn")
    with pytest.raises(ModelError, match="Choose from fashion_cnn, fashion_vit"):
        zoo.preprocessing("zzz")
    with pytest.raises(DataError, match="Did you mean fashion-test"):
        zoo.images("fashion_test")


def test_missing_dataset_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        read_split(tmp_path, "train")
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        main(["--data", str(tmp_path), "--out", str(tmp_path)])


def test_damaged_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="Expected a gzip file"):
        read_split(tmp_path, "train")


def test_import_does_not_load_torch() -> None:
    code = (
        "import json, sys, types; root = types.ModuleType('bitwright'); "
        f"root.__path__ = [{str(FOLDER.parent)!r}]; sys.modules['bitwright'] = root; "
        "import bitwright.zoo; print(json.dumps('torch' in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) is False
