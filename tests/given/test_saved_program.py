"""Files that try to run something: each is refused in one line, and nothing runs."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, ModelError
from bitwright.given.names import read_arrangement
from bitwright.given.saved_program import load_program
from bitwright.graph.store import load_graph

CODE = "__import__('pathlib').Path('ran').touch()"


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


class Net(nn.Module):
    """Names with a dash, a buffer, a constant, several outputs in containers, a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.parts = nn.ModuleDict({"x-1": nn.Linear(4, 5)})
        self.c = torch.ones(4)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        with torch.no_grad():
            z = nn.functional.gelu(y)
        y = nn.functional.interpolate(z, scale_factor=2).mean((2, 3)) * self.c
        return {"out": self.parts["x-1"](y.reshape(x.shape[0], -1)), "more": (y, [z])}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "good.pt2"
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=sizes), path)
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_torch_saves_is_read_and_computes_the_same(archive: Path) -> None:
    x = torch.randn(3, 3, 10, 8)
    read, saved = load_program(archive).module()(x), torch.export.load(archive).module()(x)
    for ours, theirs in zip(*map(torch.utils._pytree.tree_leaves, (read, saved)), strict=True):
        assert torch.equal(ours, theirs)


Change = Callable[[Any], None]


def rewritten(source: Path, end: str, change: Callable[[bytes], bytes], more: dict[str, bytes] | None = None) -> Path:
    """The archive with one entry changed and others added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(end) else content)
        for name, content in (more or {}).items():
            new.writestr(name, content)
    return Path("bad.pt2")


def program(change: Change) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return apply


def pickled(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save(Harmful(), file)
    return file.getvalue()


def target(name: str, *arguments: dict[str, Any]) -> Change:
    def change(data: Any) -> None:
        node = data["graph_module"]["graph"]["nodes"][1]
        node["target"] = name
        node["inputs"] = [{"name": "", "arg": each, "kind": 1} for each in arguments]

    return change


def expression(data: Any) -> None:
    x = data["graph_module"]["graph"]["tensor_values"]["x"]
    x["sizes"][0]["as_expr"]["expr_str"] = f"({CODE}, Symbol('s0'))[1]"


def text_in_a_symbol(data: Any) -> None:
    x = data["graph_module"]["graph"]["tensor_values"]["x"]
    x["sizes"][0]["as_expr"]["expr_str"] = f"Mul({CODE!r}, Integer(2))"


def input_name(data: Any) -> None:
    graph = data["graph_module"]["graph"]
    graph["inputs"][-1]["as_tensor"]["name"] = f"x=({CODE})"


def argument_name(data: Any) -> None:
    data["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x=({CODE})"]


def buffer_name(data: Any) -> None:
    spec = next(s for s in data["graph_module"]["signature"]["input_specs"] if "buffer" in s)
    spec["buffer"]["buffer_name"] = f'a", {CODE}, "b'


def imported(data: Any) -> None:
    context = json.dumps([{"__enum__": True, "fqn": "harm:Kind", "name": "A"}])
    leaf = {"type": None, "context": None, "children_spec": []}
    described = [1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}]
    data["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(described)


def as_pickle(data: Any) -> None:
    next(iter(data["config"].values()))["use_pickle"] = True


MODEL, TEXT = "models/model.json", {"as_string": "ran"}
HARMFUL: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "sample inputs": ("sample_inputs/model.pt", pickled),
    "pickled weight": ("model_weights_config.json", program(as_pickle)),
    "pickled constant": ("model_constants_config.json", program(as_pickle)),
    "a function of torch": (MODEL, program(target("torch.os.mkdir", TEXT))),
    "a library": (MODEL, program(target("torch.ops.load_library", TEXT))),
    "an operator that writes": (MODEL, program(target("torch.ops.aten.save.default", {"as_int": 1}, TEXT))),
    "an operator that reads": (MODEL, program(target("torch.ops.aten.from_file.default", TEXT))),
    "an operator's function": (MODEL, program(target("torch.ops.aten.relu.default.__class__", TEXT))),
    "a method": (MODEL, program(target("_operator.methodcaller", TEXT))),
    "size": (MODEL, program(expression)),
    "text in a size": (MODEL, program(text_in_a_symbol)),
    "name of an input": (MODEL, program(input_name)),
    "name of an argument": (MODEL, program(argument_name)),
    "name of a buffer": (MODEL, program(buffer_name)),
    "imported class": (MODEL, program(imported)),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_archive_that_would_run_code_is_refused(case: str, archive: Path) -> None:
    Path("harm.py").write_text("open('ran', 'w')\n")
    path = rewritten(archive, *HARMFUL[case])
    with pytest.raises(ModelError, match="It is refused") as refused:
        load_program(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "name", ["good/data/aotinductor/model/x.so", "good/MODELS/model.json", "good/data/weights/x.pt"]
)
def test_archive_with_entries_of_another_kind_is_refused(name: str, archive: Path) -> None:
    with pytest.raises(ModelError, match="unknown kind"):
        load_program(rewritten(archive, "nothing", bytes, {name: b"{}"}))


def test_guards_in_an_archive_do_not_run(archive: Path) -> None:
    def guards(data: Any) -> None:
        data["guards_code"] = [CODE]

    path = rewritten(archive, MODEL, program(guards))
    load_program(path).module()(torch.zeros(2, 3, 8, 8))
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused_in_a_line(content: bytes) -> None:
    Path("x.pt2").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read x\.pt2"):
        load_program(Path("x.pt2"))


INPUT = ["placeholder", "x", "x", [], {"d": {}}, None]
NODES: dict[str, list[Any]] = {
    "input": ["placeholder", "x", f"x=({CODE})", [], {"d": {}}, None],
    "tensor": ["get_attr", "t", f"a', {CODE}, 'b", [], {"d": {}}, None],
    "method": ["call_method", "m", "tofile", [{"n": 0}, "ran"], {"d": {}}, None],
    "argument": ["call_function", "r", "aten.relu.default", [{"n": 0}], {"d": {f"a={CODE}, b": 1}}, None],
    "operator": ["call_function", "s", "aten.save.default", [1, "ran"], {"d": {}}, None],
    "constant": ["call_function", "r", "aten.relu.default", [{"t": "load"}], {"d": {}}, None],
}


@pytest.mark.parametrize("case", NODES)
def test_graph_of_a_run_that_would_run_code_is_refused(case: str) -> None:
    nodes = [INPUT, NODES[case], ["output", "output", "output", [{"n": 1}], {"d": {}}, None]]
    with pytest.raises(BitwrightError):
        load_graph(nodes, nn.Module())(torch.zeros(1))
    assert not Path("ran").exists()


def test_arrangement_of_a_run_imports_nothing() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    context = json.dumps({"default_factory_module": "harm", "default_factory_name": "A", "dict_context": []})
    for kind, text in (("collections.defaultdict", context), ("builtins.dict", '[{"__enum__": 1}]')):
        with pytest.raises(ModelError):
            read_arrangement(json.dumps([1, {"type": kind, "context": text, "children_spec": [leaf]}]))
