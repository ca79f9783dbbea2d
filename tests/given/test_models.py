"""References to networks: what each form gives, and what is said when it cannot."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import assets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bitwright.errors import ModelError, UsageError
from bitwright.given.compat import import_timm, import_torchvision
from bitwright.given.images import Preprocessing, load_images
from bitwright.given.models import _torchvision_settings, load_model
from bitwright.given.weights import load_weights, read_state_dict

SCRIPT = """
import torch
from torch import nn
import sibling

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        return self.drop(self.conv(x)).mean((2, 3))

def build():
    return Net(sibling.WIDTH)

def half():
    return Net().half()

def needs(width):
    return Net(width)

def number():
    return 3

def explodes():
    raise KeyError("weights")

def broken():
    net = Net()
    net.conv.bias.data[1] = float("nan")
    return net

ready = Net()
VALUE = 3
"""

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")


@contextmanager
def fails(*parts: str, kind: type[Exception] = ModelError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text("WIDTH = 5")
    path = tmp_path / "net.py"
    path.write_text(SCRIPT)
    return path


def timm_or_skip() -> Any:
    try:
        return import_timm()
    except UsageError as error:
        pytest.skip(str(error))


def torchvision_or_skip() -> Any:
    try:
        return import_torchvision()
    except UsageError as error:
        pytest.skip(str(error))


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


# ---------------------------------------------------------------------------------------------- scripts


def test_callable_in_a_file(script: Path) -> None:
    torch.rand(3)
    state = torch.get_rng_state()
    model = load_model(f"{script}:build")
    assert isinstance(model.module, nn.Module)
    assert not model.module.training
    assert model.name == "build"
    assert model.preprocessing is None
    assert model.module(torch.zeros(1, 3, 8, 8)).shape == (1, 5)  # the width from sibling.py
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again = load_model(f"{script}:build").module
    assert isinstance(again, nn.Module)
    assert equal(model.module, again)  # random weights, but always the same


@pytest.mark.parametrize("name", ["Net", "ready", "half"])
def test_classes_instances_and_halves(script: Path, name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = load_model(f"{script}:{name}").module
    assert isinstance(module, nn.Module)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert any("float16" in str(w.message) for w in said) == (name == "half")


def test_settings_and_dicts_beside_the_callable(script: Path) -> None:
    with pytest.warns(UserWarning, match="No mean and std"):
        assert load_model(f"{script}:build", input_size="8x9").preprocessing == Preprocessing(input_size="8x9")
    given = load_model(f"{script}:build", input_size=8, mean="0.5", std="0.5").preprocessing
    assert given == Preprocessing(input_size=8, mean=0.5, std=0.5)
    unsized = load_model(f"{script}:build", mean=0.5).preprocessing
    assert unsized == Preprocessing(mean=0.5)
    assert load_images(np.zeros((1, 8, 9, 3), np.uint8), unsized)[0].shape == (3, 8, 9)
    script.write_text(SCRIPT + "PREPROCESSING = dict(input_size='1x8x8', mean=0.1, std=0.2)")
    found = load_model(f"{script}:build", input_size=16, crop_pct=0.5).preprocessing
    assert found == Preprocessing(input_size="1x16x16", mean=0.1, std=0.2, crop_pct=0.5)
    script.write_text(SCRIPT + "PREPROCESSING = {'build': dict(input_size=8, mean=0.1, std=0.2)}")
    assert load_model(f"{script}:build").preprocessing == Preprocessing(input_size=8, mean=0.1, std=0.2)
    assert load_model(f"{script}:Net").preprocessing is None
    script.write_text(SCRIPT + "PREPROCESSING = {'build': dict(inputsize=8)}")
    with fails("'inputsize'", kind=UsageError):
        load_model(f"{script}:build")
    script.write_text(SCRIPT + "PREPROCESSING = 3")
    with fails("PREPROCESSING", "int"):
        load_model(f"{script}:build")


def test_preprocess_function_beside_the_callable(script: Path) -> None:
    script.write_text(SCRIPT + "def preprocess(image):\n    return torch.zeros(3, 4, 4)\n")
    function = load_model(f"{script}:build").preprocessing
    assert load_images(np.zeros((1, 8, 8, 3), np.uint8), function)[0].shape == (3, 4, 4)
    with fails("preprocess", "mean", kind=UsageError):
        load_model(f"{script}:build", mean=0.5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("buidl", ["'buidl'", "Net, build, half"]),
        ("needs", ["no arguments", "width"]),
        ("number", ["returned int"]),
        ("explodes", ["weights"]),
        ("VALUE", ["found int"]),
        ("broken", ["conv.bias", "NaN", "1 of 4"]),
    ],
)
def test_bad_callables(script: Path, name: str, parts: list[str]) -> None:
    with fails(*parts):
        load_model(f"{script}:{name}")


def test_bad_scripts(script: Path, tmp_path: Path) -> None:
    with fails("nowhere.py", "does not exist"):
        load_model(f"{tmp_path}/nowhere.py:build")
    with fails("Name one of Net, build", kind=UsageError):
        load_model(str(script))
    for code, part in [("x = = 1", "SyntaxError"), ("import nothere", "nothere"), ("exit(3)", "SystemExit")]:
        script.write_text(code)
        with fails(str(script), part):
            load_model(f"{script}:build")


def test_weights_for_a_callable(script: Path, tmp_path: Path) -> None:
    module = load_model(f"{script}:ready").module
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        module.get_parameter("conv.bias").fill_(2.0)
    torch.save(module.state_dict(), tmp_path / "w.pt")
    other = load_model(f"{script}:Net@{tmp_path / 'w.pt'}").module
    assert isinstance(other, nn.Module)
    assert equal(module, other)


@pytest.mark.parametrize(
    ("reference", "part"),
    [
        ("resnet18", "zoo:NAME, timm:NAME"),
        ("fashion_cnn", "Did you mean zoo:fashion_cnn?"),
        ("net.onnx", "Expected an ONNX file, net.onnx does not exist"),
        ("weights.pt", "timm:NAME@weights.pt"),
        ("/tmp", "zoo:NAME"),
    ],
)
def test_references_of_no_known_form(reference: str, part: str) -> None:
    with fails(part, kind=UsageError):
        load_model(reference)


def test_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright import zoo

    monkeypatch.setattr(zoo, "network", lambda name: nn.Conv2d(1, 2, 3))
    settings = {"input_size": (1, 28, 28), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0}
    monkeypatch.setattr(zoo, "preprocessing", lambda name: settings)
    model = load_model("zoo:little", std=0.5)
    assert model.preprocessing == Preprocessing(input_size="1x28x28", mean=0.3, std=0.5)
    assert model.name == "little"


# --------------------------------------------------------------------------------------------- programs


def test_exported_program(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 12),)), path)
    model = load_model(str(path))
    assert isinstance(model.module, torch.export.ExportedProgram)
    assert model.name == "net"
    assert model.preprocessing is None
    assert load_model(str(path), mean=0.5, std=0.5).preprocessing == Preprocessing(input_size="8x12", mean=0.5, std=0.5)
    net[0].bias.data[0] = torch.inf
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 12),)), path)
    with fails("0.bias", "NaN or infinity"):
        load_model(str(path))


@pytest.mark.filterwarnings("ignore")
def test_program_that_is_none(tmp_path: Path) -> None:
    with fails("does not exist"):
        load_model(str(tmp_path / "no.pt2"))
    (tmp_path / "a.pt2").write_text("no program")
    with fails("a.pt2", "torch.export.save"):
        load_model(str(tmp_path / "a.pt2"))


# ------------------------------------------------------------------------------------------------- timm


def test_timm_brings_its_own_preprocessing() -> None:
    timm_or_skip()
    with pytest.warns(UserWarning, match="timm:test_vit has random weights"):
        model = load_model("timm:test_vit")
    assert model.name == "test_vit"
    assert model.preprocessing == Preprocessing(
        input_size=160, mean=0.5, std=0.5, interpolation="bicubic", crop_pct=0.95
    )
    squashed = load_model("timm:test_convnext.r160_in1k", mean=0.1).preprocessing
    assert isinstance(squashed, Preprocessing)
    assert squashed.mean == (0.1, 0.1, 0.1)


def test_timm_at_another_size_and_with_other_channels() -> None:
    timm_or_skip()
    model = load_model("timm:test_vit", input_size="1x64x96", mean=0.5, std=0.5)
    assert isinstance(model.module, nn.Module)
    assert isinstance(model.preprocessing, Preprocessing)
    assert model.preprocessing.input_size == (1, 64, 96)
    assert model.module(torch.zeros(1, 1, 64, 96)).shape == (1, 1000)


def test_unknown_timm_names() -> None:
    timm_or_skip()
    with fails("'resnet81'", "Did you mean", "resnet18"):
        load_model("timm:resnet81")
    with fails("tag", "resnet18.a1_in1k"):
        load_model("timm:resnet18.a1_in2k")


def test_timm_weights_with_other_classes(tmp_path: Path) -> None:
    timm = timm_or_skip()
    from safetensors.torch import save_file

    source = timm.create_model("test_vit", num_classes=7)
    save_file(source.half().state_dict(), tmp_path / "w.safetensors")
    model = load_model(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    assert isinstance(model.module, nn.Module)
    assert equal(model.module, source.float())
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pt")
    with fails("missing", "unexpected", "cls_token", ", ...", "w.pt"):
        load_model(f"timm:test_vit@{tmp_path / 'w.pt'}")


# ------------------------------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("name", ["squeezenet1_0", "efficientnet_v2_s", "regnet_y_400mf", "swin_v2_t"])
def test_torchvision_transform_is_matched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = torchvision_or_skip()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: nn.Conv2d(3, 1, 1))
    ours = load_model(f"torchvision:{name}").preprocessing
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert isinstance(ours, Preprocessing)
    assert int(ours.input_size[1] / ours.crop_pct) == theirs.resize_size[0]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 421, 3), dtype=np.uint8))
    assert (ours(image) - theirs(image)).abs().max() < 1e-6


def test_resized_side_survives_the_quotient() -> None:
    made = SimpleNamespace(
        resize_size=[200],
        crop_size=[112],
        mean=[0.5],
        std=[0.5],
        interpolation=SimpleNamespace(value="nearest"),
    )
    settings = _torchvision_settings(SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: made)))
    assert math.floor(112 / (112 / 200)) == 199  # the loss that has to be made good
    assert math.floor(112 / settings["crop_pct"]) == 200


def test_torchvision_networks(tmp_path: Path) -> None:
    torchvision = torchvision_or_skip()
    source = torchvision.models.squeezenet1_1(weights=None, num_classes=5)
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    model = load_model(f"torchvision:squeezenet1_1@{tmp_path / 'w.pth'}")
    assert isinstance(model.module, nn.Module)
    assert equal(model.module, source)
    assert model.output is None


def test_torchvision_segmentation_ignores_the_training_head(tmp_path: Path) -> None:
    torchvision = torchvision_or_skip()
    source = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, aux_loss=True
    )
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_model(f"torchvision:deeplabv3_mobilenet_v3_large@{tmp_path / 'w.pth'}", input_size="64")
    assert isinstance(model.module, nn.Module)
    assert model.output == "out"
    assert set(model.module(torch.zeros(1, 3, 64, 64))) == {"out"}
    assert isinstance(model.preprocessing, Preprocessing)
    assert (model.preprocessing.input_size, model.preprocessing.crop_pct) == ((3, 64, 64), 1.0)


def test_unknown_torchvision_names() -> None:
    torchvision_or_skip()
    with fails("Did you mean", "resnet18"):
        load_model("torchvision:resnet81")
    with fails("network of images", "file.py:callable"):
        load_model("torchvision:raft_small")


def test_densenet_names_of_old_files_are_understood(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denselayer1 = nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})

    old = {}
    for name, value in Layer().state_dict().items():
        old[name.replace("norm1", "norm.1").replace("conv2", "conv.2")] = value + 1
    module = Layer()
    load_weights(module, old)
    assert torch.equal(module.state_dict()["denselayer1.norm1.weight"], torch.full((2,), 2.0))


# ------------------------------------------------------------------------------------------ checkpoints


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in small().state_dict().items()}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "ema", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.model.", "model._orig_mod.", "net.module.", "a.b.model."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nested_prefixed_and_half_checkpoints(tmp_path: Path, key: str, prefix: str, dtype: torch.dtype) -> None:
    state = {prefix + k: v.to(dtype) if v.is_floating_point() else v for k, v in filled(2).items()}
    content = {key: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.th")
    module = small()
    load_weights(module, read_state_dict(tmp_path / "w.th"))
    assert module[0].weight.dtype == torch.float32
    assert all((value == 2).all() for value in module.state_dict().values())


def test_averaged_weights_win_and_say_so(tmp_path: Path) -> None:
    averaged = {f"module.{name}": value for name, value in filled(2).items()}
    content = {"model": filled(1), "model_ema": {**averaged, "n_averaged": torch.tensor(9)}}
    torch.save(content, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="averaged weights model_ema are used"):
        state = read_state_dict(tmp_path / "w.pt")
    module = small()
    load_weights(module, state)
    assert (module[0].bias == 2).all()


def test_network_whose_own_names_start_with_a_prefix() -> None:
    module = nn.ModuleDict({"model": nn.ModuleDict({"model": nn.Linear(2, 2)})})
    own = {name: value.clone() for name, value in module.state_dict().items()}
    load_weights(module, {f"module.{name}": value + 1 for name, value in own.items()})
    assert all(torch.equal(value, own[name] + 1) for name, value in module.state_dict().items())
    load_weights(module, own)
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_network_that_is_wrapped_and_weights_that_are_not() -> None:
    module = nn.ModuleDict({"model": nn.ModuleDict({"net": small()})})
    load_weights(module, filled(2))
    assert all((value == 2).all() for value in module.state_dict().values())


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_wrapped_parts_of_a_network(wrapper: str) -> None:
    module = nn.ModuleDict({"body": small(), "head": nn.Linear(2, 2)})
    state = {name.replace("body.", f"body.{wrapper}."): value + 1 for name, value in module.state_dict().items()}
    load_weights(module, state)
    assert torch.equal(module["head"].weight, state["head.weight"])
    assert torch.equal(module["body"][0].weight, state[f"body.{wrapper}.0.weight"])


def test_compiled_network_takes_plain_weights() -> None:
    module = small()
    load_weights(torch.compile(module, backend="eager"), filled(2))
    assert (module[0].weight == 2).all()


def test_network_beside_what_only_training_reads() -> None:
    module = small()
    state = {f"model.{name}": value for name, value in filled(2).items()} | {"loss.weight": torch.ones(3)}
    with pytest.warns(UserWarning, match=r"1 tensors \(loss.weight\) are left out"):
        load_weights(module, state)
    assert (module[0].weight == 2).all()


def test_network_that_is_there_twice() -> None:
    state = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in filled(2).items()}
    with fails("w.pt", "found it under student and under teacher"):
        load_weights(small(), state, "w.pt")


def test_old_checkpoints_may_lack_the_batch_counter() -> None:
    state = {name: value for name, value in filled(2).items() if "tracked" not in name}
    module = small()
    load_weights(module, state)
    assert (module[1].running_var == 2).all()
    assert module[1].num_batches_tracked == 0


def test_what_does_not_fit_is_listed() -> None:
    state = filled(1)
    del state["0.weight"]
    state.update({f"extra{k}": torch.zeros(1) for k in range(5)}, **{"0.bias": torch.zeros(9)})
    with fails(
        "1 missing (0.weight)",
        "5 unexpected (extra0, extra1, extra2, ...)",
        "1 of another shape (0.bias (9,) instead of (4,))",
        "w.pt",
    ):
        load_weights(small(), state, "w.pt")


class Config(dict[str, int]):
    """A dict of a trainer's own."""


BOOKKEEPING: dict[str, Any] = {
    "scalar": np.float64(0.5),
    "array": np.arange(3),
    "random state": np.random.get_state(),
    "arguments": argparse.Namespace(out=Path("runs"), when=datetime.datetime(2026, 1, 1)),
    "defaults": collections.defaultdict(list, {"loss": [1.0]}),
    "recent": collections.deque([1, 2]),
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "set": frozenset([1]),
    "network": nn.ReLU(),
}


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_bookkeeping_beside_the_weights_is_passed_over(tmp_path: Path, key: str) -> None:
    for content in ({"best": BOOKKEEPING[key], "state_dict": filled(2)}, {**filled(2), "best": BOOKKEEPING[key]}):
        torch.save(content, tmp_path / "w.pt")
        state = read_state_dict(tmp_path / "w.pt")
        assert state.keys() == filled(2).keys()
        assert all((value == 2).all() for value in state.values())


def test_objects_of_others_are_passed_over_and_named(tmp_path: Path) -> None:
    torch.save({"config": Config(a=1), "model": Config(filled(2))}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"not read: .*test_models.Config\."):
        assert read_state_dict(tmp_path / "w.pt").keys() == filled(2).keys()


class Never:
    called = False

    def __init__(self, *_: Any) -> None:
        Never.called = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Never, ("x",)

    def __setstate__(self, state: Any) -> None:
        Never.called = True


def test_nothing_that_a_file_names_is_called(tmp_path: Path) -> None:
    torch.save({"hook": Never(), "state_dict": filled(2)}, tmp_path / "w.pt")
    Never.called = False
    with pytest.warns(UserWarning, match="not read"):
        read_state_dict(tmp_path / "w.pt")
    assert not Never.called


def test_tensors_of_a_class_of_their_own(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2).as_subclass(Own)}, tmp_path / "w.pt")
    with fails("w.pt", "tensors of a class of their own", "test_models.Own", "Save plain ones"):
        read_state_dict(tmp_path / "w.pt")


class Own(torch.Tensor):
    """A tensor of a library's own."""


def test_programs_under_the_ending_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(small()).save("scripted.pt")
    with fails("scripted.pt is a TorchScript program", "torch.jit.load('scripted.pt').state_dict()"):
        read_state_dict("scripted.pt")
    with pytest.raises(UsageError, match=r"scripted.pt is a TorchScript program"):
        load_model("scripted.pt")
    program = torch.export.export(small().eval(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, "saved.pt2")
    Path("saved.pt2").rename("saved.pt")
    with fails("saved.pt is a program of torch.export", ".pt2"):
        read_state_dict("saved.pt")


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/never",)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1",)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (Dangerous(), ["wants to run code", "system", "refused"]),
        ({"epoch": 3, "state_dict": filled(1), "x": Evaluated()}, ["wants to run code", "eval", "refused"]),
        (nn.Linear(2, 2), ["wants to run code", "Linear"]),
        ({"epoch": 3, "model": nn.Linear(2, 2)}, ["wants to run code", "Linear"]),
        ([torch.zeros(2)], ["state dict", "found a list"]),
        ({"epoch": 3, "lr": 0.1}, ["found a dict of epoch, lr"]),
        ({}, ["an empty dict"]),
        (torch.zeros(2), ["found a Tensor"]),
    ],
)
def test_checkpoints_that_are_no_state_dict(tmp_path: Path, content: Any, parts: list[str]) -> None:
    torch.save(content, tmp_path / "w.pt")
    with fails("w.pt", *parts):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_checkpoints_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with fails(name, "does not exist"):
        read_state_dict(tmp_path / name)
    (tmp_path / name).write_text("text")
    with fails(name, "cannot read"):
        read_state_dict(tmp_path / name)
    torch.save({"x": torch.zeros(5000)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with fails(name, "cannot read"):
        read_state_dict(tmp_path / name)


def test_file_of_another_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    with fails("w.npz", ".safetensors"):
        read_state_dict(tmp_path / "w.npz")


# ----------------------------------------------------------------------------------------- real weights


@assets.requires_assets
def test_real_networks_score_through_the_two_loaders(tmp_path: Path) -> None:
    timm_or_skip()
    pixels = assets.write_cifar(tmp_path, "test", 200)
    for name, at_least in [("cifar_resnet20", 0.74), ("cifar_vit", 0.48)]:
        model = load_model(f"{assets.__file__}:{name}")
        images = load_images(pixels, model.preprocessing)
        assert isinstance(model.module, nn.Module)
        assert images.labels is not None
        with torch.inference_mode():
            found = torch.cat([model.module(batch).argmax(1) for batch in images.batches(100)])
        assert (found == images.labels).float().mean() >= at_least


@assets.requires_assets
def test_real_preprocessing_and_labels() -> None:
    timm = timm_or_skip()
    model = load_model(f"timm:tf_efficientnet_lite0@{assets.weights('tf_efficientnet_lite0.pt')}")
    assert model.preprocessing == Preprocessing(**assets.PREPROCESSING["efficientnet_lite0"])
    images = load_images(f"{assets.imagenet_folder()}[::100]", model.preprocessing, labels=assets.imagenet_labels())
    config = timm.data.resolve_model_data_config(model.module)
    transform = timm.data.create_transform(**config)
    with Image.open(assets.imagenet_folder() / images.names[7]) as image:
        assert torch.equal(images[7], transform(image.convert("RGB")))
    assert isinstance(model.module, nn.Module)
    assert images.labels is not None
    with torch.inference_mode():
        assert (model.module(images.batch(range(10))).argmax(1) == images.labels).sum() >= 7
