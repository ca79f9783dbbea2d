"""plan.json: written, edited, read back, obeyed, refused."""

from __future__ import annotations

import json

import cases
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.bits import plan as module
from bitwright.bits.plan import Plan, insert_plan, plan_of, plans_of, structure_digest
from bitwright.cli import main
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Rule, Scheme
from bitwright.run.folder import write_files


def student(name="residual", **settings):
    return insert_quantizers(cases.prepared(name), Scheme(**settings))


def edited(plan, path, change):
    """The plan after a change of its JSON, through the file that a user edits."""
    data = json.loads(plan.model_dump_json(exclude_none=True))
    change(data["layers"])
    path.write_text(json.dumps(data))
    return Plan.read(path)


def widths(model):
    """Bits of weights and of activations as the quantizers have them, by layer."""
    weights = {x.name: model.quantizer(x.weight).grid.bits for x in model.layers if x.weight}
    return weights, {x.name: model.quantizer(x.activation).grid.bits for x in model.layers if x.activation}


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "generic"])
def test_every_network_comes_back_from_its_plan(name, runtime, tmp_path):
    rules = (Rule.parse("*=w3a16"), Rule.parse("input=a8"))
    model = student(name, runtime=runtime, rules=rules, granularity="group", group_size=2)
    plan_of(model).write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    assert read == plan_of(model)
    again = insert_plan(cases.prepared(name), read)
    assert widths(again) == widths(model)
    blocks = [[m.quantizer(x.weight).block for x in m.layers if x.weight] for m in (model, again)]
    assert blocks[0] == blocks[1]
    assert again.unquantized == model.unquantized


def test_what_is_float_stays_float(tmp_path):
    scheme = Scheme(rules=tuple(map(Rule.parse, ["attention.*=wfloat", "mlp.*=afloat", "positions=afloat"])))
    model = insert_quantizers(cases.prepared("transformer"), scheme)
    plan_of(model).write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    assert read.layers["attention.qkv"].weight.bits == "float"
    assert read.layers["positions"].activation.bits == "float"
    again = insert_plan(cases.prepared("transformer"), read)
    assert widths(again) == widths(model)
    assert {u.name for u in again.unquantized} == {u.name for u in model.unquantized}


class Wide(nn.Module):
    """Enough weights that a bit of one layer is more than two percent of the file."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))


def test_an_edited_plan_is_obeyed_layer_by_layer_and_in_the_files_bytes(tmp_path):
    torch.manual_seed(0)
    network = Wide().eval()
    before = bw.quantize(network, cases.dataset(), recipe="rtn", weights=8)
    before.save(tmp_path / "before")

    def change(layers):
        layers["a"]["weight"]["bits"] = 3
        layers["b"]["weight"] |= {"bits": 5, "granularity": "tensor"}
        layers["a"]["activation"]["bits"] = layers["relu"]["activation"]["bits"] = 16

    plan = edited(Plan.read(tmp_path / "before"), tmp_path / "mine.json", change)
    after = bw.quantize(network, cases.dataset(), recipe="rtn", plan=tmp_path / "mine.json")
    after.save(tmp_path / "after")
    assert widths(after)[0] == {"a": 3, "b": 5, "c": 8}
    assert widths(after)[1]["a"] == 16
    assert widths(after)[1]["b"] == widths(after)[1]["input"] == 8
    for name, layer in ((x.name, x) for x in after.layers if x.weight):
        codes = after.graph.get_submodule(layer.weight.replace("quantizer_", "frozen_", 1)).codes
        assert int(codes.max()) <= 2 ** (widths(after)[0][name] - 1) - 1
        assert after.quantizer(layer.weight).scale.numel() == (1 if name == "b" else 64)
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("before", "after")]
    saved = 192 * 64 * 5 // 8 + 64 * 64 * 3 // 8 + 4 * 63
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.02)
    assert after.result["bits"] == {"weights": "mixed", "activations": "mixed"}
    assert Plan.read(tmp_path / "after").layers == plan.layers
    assert plan_of(bw.load(tmp_path / "after")) == Plan.read(tmp_path / "after")


def test_layers_that_a_plan_leaves_open_take_the_calls_bits():
    plan = Plan.model_validate({"layers": {"conv": {"weight": {"bits": 2}}}})
    model = insert_plan(cases.prepared("residual"), plan, Scheme(weights=6, activations=4))
    assert widths(model)[0] == {"stem": 6, "conv": 2, "head": 6}
    assert set(widths(model)[1].values()) == {4}


def test_rules_come_after_the_plan():
    plan = plan_of(student(weights=3))
    model = insert_plan(cases.prepared("residual"), plan, Scheme(rules=(Rule.parse("head=w8"), Rule.parse("stem=a4"))))
    assert widths(model)[0] == {"stem": 3, "conv": 3, "head": 8}
    assert widths(model)[1]["stem"] == 4


def test_stored_operands_take_the_plans_bits(tmp_path):
    plan = edited(plan_of(student("transformer")), tmp_path / "p.json", give("positions", "activation", bits=4))
    model = insert_plan(cases.prepared("transformer"), plan)
    assert widths(model)[1]["positions"] == 4
    assert widths(model)[1]["token"] == 8


def test_names_are_taken_literally():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a[1]", nn.Conv2d(3, 4, 1))
            self.add_module("a1", nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.get_submodule("a1")(torch.relu(self.get_submodule("a[1]")(x)))

    model = bw.api.preview(Odd().eval(), cases.dataset())
    plan = plan_of(model)
    names = list(widths(model)[0])
    changed = plan.model_copy(
        update={"layers": plan.layers | {names[0]: plan.layers[names[0]].model_copy(
            update={"weight": plan.layers[names[0]].weight.model_copy(update={"bits": 2})})}}
    )  # fmt: skip
    assert widths(insert_plan(model.teacher, changed))[0] == {names[0]: 2, names[1]: 8}


def test_a_symmetric_plan_stays_symmetric():
    plan = plan_of(student(activation_grid="symmetric"))
    assert plan.layers["input"].activation.symmetric
    assert insert_plan(cases.prepared("residual"), plan).scheme.activation_grid == "symmetric"


def test_the_fingerprint_is_of_names_and_shapes_not_of_weights():
    again = cases.make("residual")
    with torch.no_grad():
        for p in again.parameters():
            p.add_(0.1)
    same, other = bw.api.preview(again, cases.dataset()), student("called_twice")
    assert (
        structure_digest(student().graph)
        == structure_digest(cases.prepared("residual").graph)
        == structure_digest(same.graph)
    )
    assert structure_digest(student().graph) != structure_digest(other.graph)


def test_all_layers_of_a_group_may_be_given_float_activations(tmp_path):
    def change(layers):
        for name in ("stem", "relu"):
            layers.setdefault(name, {})["activation"] = {"bits": "float"}

    made = insert_plan(cases.prepared("residual"), edited(plan_of(student("residual")), tmp_path / "plan.json", change))
    quantized = {layer.name for layer in made.layers if layer.activation is not None}
    assert not {"stem", "relu"} & quantized
    assert "conv" in quantized


def give(layer, part, **values):
    """A change of one entry of a plan."""
    return lambda layers: layers.setdefault(layer, {}).setdefault(part, {"bits": 8}).update(values)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("residual", give("stme", "weight", bits=4), "layer 'stme', the network none. The closest are stem"),
        ("residual", give("stem", "weight", bits=9), "'stem' weights of 9 bits, onnxruntime has 2, 3"),
        ("residual", give("input", "activation", bits=12), "'input' activations of 12 bits"),
        ("residual", give("stem", "weight", bits="4"), "layers > stem > weight > bits"),
        ("residual", give("stem", "weight", bits=4.5), "layers > stem > weight > bits"),
        ("residual", give("stem", "weight", bit=4), "layers > stem > weight > bit: extra"),
        ("residual", give("stem", "weight", symmetric=False), "weights are always symmetric"),
        ("residual", give("stem", "activation", bits=4), "'stem' and 'relu' 4 and 8 bits"),
        ("residual", give("relu", "weight", bits=4), "'relu' bits of weights, but it has no weight"),
        ("residual", give("input", "activation", symmetric=True), "all symmetric, or none"),
        ("residual", give("conv", "activation", shares_scale_with=["input"]), "'conv' share its scale with input"),
        (
            "tied_weights",
            give("second", "weight", bits=4),
            "'first' and 'second' 8 and 4 bits of weights, but they have one",
        ),
        ("tied_weights", give("first", "weight", bits="float"), "'first' and 'second' float and 8 bits of weights"),
        ("residual", give("head", "activation", bits=8), "nothing is quantized there"),
        (
            "transposed",
            give("plain", "weight", granularity="group", group_size=2),
            "which can only have one per channel",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(name, change, expected, tmp_path):
    with pytest.raises(bw.UsageError, match=expected) as caught:
        insert_plan(cases.prepared(name), edited(plan_of(student(name)), tmp_path / "plan.json", change))
    assert "\n" not in str(caught.value)


def test_inputs_of_a_concatenation_cannot_differ(tmp_path):
    plan = plan_of(student("dense", runtime="generic"))
    change = give("input", "activation", bits=4)
    with pytest.raises(bw.UsageError, match="'input' 4 bits of activations, but it shares its scale with"):
        insert_plan(cases.prepared("dense"), edited(plan, tmp_path / "plan.json", change))


def test_a_plan_of_another_network_is_refused():
    plan = plan_of(student("transformer"))
    with pytest.raises(bw.UsageError, match=r"made for another network.*layers are not in this one, such as") as caught:
        insert_plan(cases.prepared("residual"), plan)
    assert "\n" not in str(caught.value)
    meant = plan_of(student()).model_copy(update={"network": None})
    assert insert_plan(cases.prepared("residual"), meant).layers
    wrong = plan_of(student()).model_copy(update={"network": "0" * 16})
    with pytest.raises(bw.UsageError, match="shapes of weights differ"):
        insert_plan(cases.prepared("residual"), wrong)


def test_several_plans_are_those_of_each_choice_and_the_network_is_read_once(monkeypatch):
    model = student("transformer")
    keys = [x.weight for x in model.layers if x.weight] + [x.activation for x in model.layers if x.activation]
    several = [{}, dict.fromkeys(keys, 4), {key: (2, 4)[i % 2] for i, key in enumerate(keys)}, {keys[0]: 3}]
    alone = [plan_of(model, bits) for bits in several]
    read = []
    monkeypatch.setattr(module, "structure_digest", lambda graph: read.append(graph) or alone[0].network)
    assert plans_of(model, several) == alone
    assert len(read) == 1
    assert len({plan.model_dump_json() for plan in alone}) == 4


def test_a_plan_for_another_runtime_is_refused():
    plan = plan_of(student())
    with pytest.raises(bw.UsageError, match="for the runtime onnxruntime, found runtime='generic'"):
        plan.scheme(Scheme(runtime="generic"))
    assert plan_of(student(runtime="generic")).scheme(Scheme()).runtime == "generic"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "the file: input should be"),
        ("{}", "layers: field required"),
        ('{"layers": {"a": {}, "a": {}}}', "'a' stands twice"),
    ],
)
def test_files_that_hold_no_plan_are_one_line(text, expected, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(bw.UsageError, match=expected) as caught:
        Plan.read(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(bw.UsageError, match="found none"):
        Plan.read(tmp_path / "missing.json")


def test_the_command_reads_a_plan(tmp_path, capsys):
    network = bw.api.preview("zoo:fashion_cnn", "zoo:fashion[:2]")
    names = [x.name for x in network.layers if x.weight]
    plan_of(network, {x.weight: 2 for x in network.layers if x.weight and x.name != names[1]}).write(
        tmp_path / "p.json"
    )
    call = ["quantize", "zoo:fashion_cnn", "zoo:fashion[:8]", "--plan", str(tmp_path / "p.json"), "--dry-run", "--json"]
    assert main(call) == 0
    rows = {r["name"]: r["weight_bits"] for r in json.loads(capsys.readouterr().out)["layers"] if r["weight_bits"]}
    assert {n: b for n, b in rows.items() if n in names} == {n: 8 if n == names[1] else 2 for n in names}
    (tmp_path / "p.json").write_text('{"layers": {"nothing": {}}}')
    assert main(call) == 2
    assert "layer 'nothing', the network none" in capsys.readouterr().err


def test_a_run_folder_writes_what_it_reads(tmp_path):
    model = bw.quantize(cases.model("transformer"), cases.dataset(), recipe="rtn", weights=4)
    write_files(model, tmp_path)
    plan = Plan.read(tmp_path)
    assert plan.network == structure_digest(cases.prepared("transformer").graph)
    again = bw.quantize(cases.model("transformer"), cases.dataset(), recipe="rtn", plan=plan)
    assert torch.equal(again(cases.images()), model(cases.images()))
