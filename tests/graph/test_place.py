"""Every floating tensor is quantized or listed; groups, moves and concatenations share what they should."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Outputs, captured, dataset, images, prepared
from torch import Tensor, fx, nn

from bitwright.errors import UsageError
from bitwright.graph import ops
from bitwright.graph.capture import capture
from bitwright.graph.insert import bits_by_key
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import Watcher
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.scheme import Rule, Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate

TARGETS = ["onnxruntime", "generic"]


@cache
def student(name: str, runtime: str) -> Student:
    """Shared: not changed by any test."""
    return insert_quantizers(prepared(name), Scheme(runtime=runtime))


def with_rules(name: str, *rules: str, runtime: str = "onnxruntime", **settings: object) -> Student:
    scheme = Scheme(runtime=runtime, rules=tuple(map(Rule.parse, rules)), **settings)
    return insert_quantizers(prepared(name), scheme)


def quantizer_after(made: Student, layer: str) -> str | None:
    """Key of the quantizer that reads the layer's output directly."""
    for node in made.graph.graph.nodes:
        if node.op == "call_module" and node.args[0].op != "get_attr" and node.args[0].meta.get("layer") == layer:
            return str(node.target)
    return None


def carries(node: fx.Node) -> fx.Node:
    """The node whose values this one holds, behind operators that only move data."""
    while node.op == "call_function" and ops.kind(node) == "move":
        node = node.args[0]
    return node


STORED = {"weight", "bias", "parameter"}


def is_listed(node: fx.Node, made: Student) -> bool:
    """Whether a tensor stands in ``unquantized``: stored ones by their path, others by their layer."""
    if node.op == "get_attr":
        return any(u.name == node.target for u in made.unquantized if u.op in STORED)
    return any(u.name == node.meta.get("layer") for u in made.unquantized if u.op not in STORED)


def floats_without_a_word(made: Student) -> list[str]:
    """Every edge of the graph that carries floats to an operator, neither quantized nor listed."""
    missing = []
    for node in made.graph.graph.nodes:
        if node.op not in {"call_function", "output"} or (node.op == "call_function" and ops.kind(node) == "move"):
            continue
        for read in node.all_input_nodes:
            if not ops.is_float_tensor(read):
                continue
            source = carries(read)
            if source.op == "call_module":
                assert isinstance(made.graph.get_submodule(str(source.target)), Quantizer | BiasQuantizer)
            elif not is_listed(source, made):
                missing.append(f"{source.name} -> {node.name}")
    return missing


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_skipped_in_silence(name: str, runtime: str) -> None:
    assert floats_without_a_word(student(name, runtime)) == []
    assert all(u.reason for u in student(name, runtime).unquantized)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "float"},
        {"activations": "float"},
        {"granularity": "group", "group_size": 2},
        {"granularity": "tensor"},
        {"outputs": True},
        {"rules": (Rule.parse("*=wfloat"),)},
        {"rules": (Rule.parse("*=afloat"),)},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["transformer", "squeeze_excite", "transposed", "tied_weights", "called_twice", "dense"]
)
def test_nothing_is_skipped_whatever_the_scheme(name: str, settings: dict) -> None:
    made = insert_quantizers(prepared(name), Scheme(**settings))
    assert floats_without_a_word(made) == []
    roles = {m.role for m in made.graph.modules() if isinstance(m, Quantizer)}
    if "weights" in settings or str(settings.get("rules", "")).count("weights='float'"):
        assert "weight" not in roles
    if "activations" in settings or str(settings.get("rules", "")).count("activations='float'"):
        assert roles == {"weight"}


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_a_tensor_is_not_both_quantized_and_listed(name: str, runtime: str) -> None:
    made = student(name, runtime)
    for node in made.graph.graph.nodes:
        if node.op == "call_module":
            assert not is_listed(node.args[0], made)


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_every_linear_operator_is_quantized(name: str, runtime: str) -> None:
    graph = student(name, runtime).graph
    for node in graph.graph.nodes:
        if ops.base_name(node) in ops.LINEAR:
            assert graph.get_submodule(str(node.args[1].target)).role == "weight"
            assert carries(node.args[0]).op == "call_module"


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_uncalibrated_student_is_the_teacher(name: str, runtime: str) -> None:
    x = images(3)
    expected, found = prepared(name).graph(x), student(name, runtime).flat(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("runtime", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_no_quantizer_follows_a_move(name: str, runtime: str) -> None:
    for node in student(name, runtime).graph.graph.nodes:
        if node.op == "call_module":
            assert node.args[0].op != "call_function" or ops.kind(node.args[0]) != "move"
            assert node.args[0].op != "call_module"


@pytest.mark.parametrize("name", CASES)
def test_operators_that_move_data_make_no_new_values(name: str) -> None:
    """What the table calls a move yields values of its input and zeros, so that they lie on its grid."""
    seen: dict[str, object] = {}

    class Recorder(Watcher):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Recorder(prepared(name).graph, {}).run(images(2))
    for node in prepared(name).graph.graph.nodes:
        if node.op != "call_function" or ops.kind(node) != "move":
            continue
        before = {0.0, *flat(seen[node.args[0].name])}
        after = seen[node.name]
        if ops.base_name(node) in ops.PICK:
            assert isinstance(after, tuple | list)
            after = after[0]  # the rest is where they lay
        assert set(flat(after)) <= before, node.format_node()


def flat(value: object) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for t in values for v in t.flatten().tolist()]


def test_groups_for_a_generic_target() -> None:
    made = student("residual", "generic")
    assert [n for n in ("stem", "conv", "bn2", "add") if quantizer_after(made, n)] == []
    assert quantizer_after(made, "relu")
    assert quantizer_after(made, "relu_1")
    rows = {row.name: row for row in made.layers}
    assert rows["stem"].activation == quantizer_after(made, "relu")
    assert rows["conv"].activation == quantizer_after(made, "relu_1")
    reasons = {u.name: u.reason for u in made.unquantized}
    assert reasons["conv"] == reasons["add"] == "inside the group that is quantized after relu_1"

    made = student("squeeze_excite", "generic")
    assert quantizer_after(made, "expand") is None
    assert quantizer_after(made, "depthwise") is None
    assert quantizer_after(made, "silu")
    assert quantizer_after(made, "silu_1")


def test_groups_for_onnx_runtime() -> None:
    made = student("residual", "onnxruntime")
    assert quantizer_after(made, "stem") is None  # the clamp is the quantizer's
    assert quantizer_after(made, "conv")  # its kernel ends in a requantization
    assert quantizer_after(made, "add") is None
    assert quantizer_after(made, "relu_1")

    made = student("squeeze_excite", "onnxruntime")
    assert quantizer_after(made, "expand")  # SiLU is no clamp
    assert quantizer_after(made, "silu")


def test_attention_has_quantizers_at_both_operands_of_both_products() -> None:
    for runtime in TARGETS:
        graph = student("transformer", runtime).graph.graph
        products = [n for n in graph.nodes if ops.base_name(n) == "matmul"]
        assert len(products) == 2
        for node in products:
            assert [carries(n).op for n in node.args] == ["call_module", "call_module"]


@pytest.mark.parametrize("name", ["dense", "transformer", "shuffle"])
def test_concatenations_share_a_scale_where_the_target_wants_it(name: str) -> None:
    for runtime in TARGETS:
        graph = student(name, runtime).graph.graph
        for node in graph.nodes:
            if ops.base_name(node) != "cat":
                continue
            (after,) = node.users
            keys = {carries(n).target for n in node.args[0]} | {after.target}
            assert (len(keys) == 1) == (runtime == "generic")


def test_chained_concatenations_take_the_largest_number_of_bits() -> None:
    made = with_rules("dense", "input=a16", "relu=a4", runtime="generic")
    key = quantizer_after(made, "input")
    assert {quantizer_after(made, layer) for layer in ("relu", "cat", "relu_1", "cat_1")} == {key}
    assert made.quantizer(key).grid.bits == 16


def test_a_tensor_in_two_concatenations_brings_their_grids_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv1(x).relu(), self.conv2(x).relu()
            return self.head(torch.cat([x, a], 1)) + self.head(torch.cat([a, b], 1))

    teacher = prepare(capture(Twice(), images(2)))
    scheme = Scheme(runtime="generic", rules=(Rule.parse("input=a16"),))
    made = insert_quantizers(teacher, scheme)
    keys = {quantizer_after(made, layer) for layer in ("input", "relu", "relu_1", "cat", "cat_1")}
    assert len(keys) == 1
    assert made.quantizer(keys.pop()).grid.bits == 16


def test_rules_are_taken_in_order() -> None:
    made = with_rules("residual", "*=w4a4", "head=w8", "conv=w3a6", "conv=w5")
    bits = {m.name: m.grid.bits for m in made.graph.modules() if isinstance(m, Quantizer) and m.role == "weight"}
    assert bits == {"stem": 4, "conv": 5, "head": 8}
    assert made.quantizer(quantizer_after(made, "conv")).grid.bits == 6
    assert made.quantizer(quantizer_after(made, "relu")).grid.bits == 4
    assert made.quantizer(quantizer_after(made, "input")).grid.bits == 4
    assert with_rules("residual", "head=w2", "*=w4").quantizer("quantizer_weight_head").grid.bits == 4


def test_a_rule_on_any_member_decides_for_its_group() -> None:
    made = with_rules("residual", "conv=a5", runtime="generic")
    assert made.quantizer(quantizer_after(made, "relu_1")).grid.bits == 5


def test_wildcards() -> None:
    made = with_rules("transformer", "mlp.*=w3", "attention.[pq]*=w2")
    bits = {m.name: m.grid.bits for m in made.graph.modules() if isinstance(m, Quantizer) and m.role == "weight"}
    expected = {"patches": 8, "attention.qkv": 2, "attention.proj": 2, "mlp.0": 3, "mlp.2": 3, "head": 8}
    assert bits == expected


@pytest.mark.parametrize("named", ["first", "second"])
@pytest.mark.parametrize(("rule", "bits"), [("w3", 3), ("wfloat", None)])
def test_a_rule_on_any_layer_of_a_weight_decides_for_all_of_them(named: str, rule: str, bits: int | None) -> None:
    made = with_rules("tied_weights", "*=w5", f"{named}={rule}")
    keys = {layer.name: layer.weight for layer in made.layers if layer.name in {"first", "second"}}
    assert len(keys) == 2
    assert len(set(keys.values())) == 1
    for key in keys.values():
        assert (None if key is None else made.quantizer(key).grid.bits) == bits
    floats = [u.name for u in made.unquantized if u.op == "weight"]
    assert floats == (["first.weight"] if bits is None else [])


def test_a_rule_for_nothing_names_the_three_closest() -> None:
    with pytest.raises(UsageError) as caught:
        with_rules("transformer", "attention.prok=w4")
    text = str(caught.value)
    assert "'attention.prok' matches no layer" in text
    close = text.split("The closest are ")[1].rstrip(".").split(", ")
    assert len(close) == 3
    assert close[0] == "attention.proj"


def test_float_by_rule() -> None:
    made = with_rules("residual", "conv=wfloat", "stem=afloat")
    reasons = {(u.name, u.op): u.reason for u in made.unquantized}
    assert reasons["conv.weight", "weight"] == "float by rule"
    assert reasons["relu", "relu"] == "float by rule"
    assert ("stem.weight", "weight") not in reasons
    assert "conv.bias" in {u.name for u in made.unquantized}
    assert "stem.bias" not in {u.name for u in made.unquantized}
    assert floats_without_a_word(made) == []


@pytest.mark.parametrize("text", ["head", "head=", "=w4", "head=w9", "head=w1a8", "head=a9", "head=a0", "head=x4"])
def test_rules_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match=r"Expected (a rule|2 to 8)"):
        Rule.parse(text)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_bits_of_weights_and_activations(bits: int) -> None:
    made = insert_quantizers(prepared("norm_then_conv"), Scheme(weights=bits, activations=bits))
    Calibrate().run(made, prepared("norm_then_conv"), dataset(4), Run())
    for quantizer in (m for m in made.graph.modules() if isinstance(m, Quantizer)):
        values = torch.unique(quantizer(torch.linspace(-9, 9, 5000)) if quantizer.role != "weight" else quantizer.scale)
        assert quantizer.grid.bits == bits
        assert quantizer.role == "weight" or 1 < len(values) <= 2**bits
    codes = made.freeze().graph.get_submodule("frozen_weight_conv").codes
    assert len(torch.unique(codes)) <= 2**bits


def test_sixteen_bit_activations_and_a_class_token() -> None:
    """A stored token on the grid of a concatenation has as many bits as its neighbours."""
    for runtime in TARGETS:
        made = insert_quantizers(prepared("transformer"), Scheme(activations=16, runtime=runtime))
        Calibrate(weights="minmax").run(made, prepared("transformer"), dataset(6), Run())
        x = images(3)
        before = made.flat(x)[0]
        assert torch.equal(made.freeze().flat(x)[0], before)
        expected = prepared("transformer").graph(x)[0]
        assert float((before - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [0, 1, 9, 16, "x", 4.5])
def test_weight_bits_that_do_not_exist(bits: object) -> None:
    with pytest.raises(UsageError, match="2 to 8 bits for weights"):
        Scheme(weights=bits)


def test_a_module_called_input_has_its_own_quantizer() -> None:
    made = student("named_input", "onnxruntime")
    keys = [str(n.target) for n in made.graph.graph.nodes if n.op == "call_module" and n.args[0].op != "get_attr"]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_has_its_own_quantizer_without_shared_concats(name: str) -> None:
    nodes = [n for n in student(name, "onnxruntime").graph.graph.nodes if n.op == "call_module"]
    assert len({str(n.target) for n in nodes}) == len(nodes)


class JoinedHeads(nn.Module):
    """Boxes and scores of two levels in one tensor, as YOLO files have it; decoded there if asked for."""

    def __init__(self, *, decodes: bool, reads: bool = False) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.boxes, self.scores = (nn.ModuleList(nn.Conv2d(8, n, 1) for _ in range(2)) for n in (4, 5))
        self.last = nn.Linear(9, 2) if reads else nn.Identity()
        self.decodes = decodes

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x).relu()
        levels = zip(self.boxes, self.scores, (near, self.far(near).relu()), strict=True)
        each = [torch.cat([box(f), score(f).sigmoid()], 1).flatten(2) for box, score, f in levels]
        found: Tensor = torch.cat(each, 2).permute(0, 2, 1)
        if self.decodes:
            found = torch.cat([found[..., :2] * 8, found[..., 2:4].exp() * 8, found[..., 4:]], -1)
        return self.last(found)


def heads(runtime: str, scheme: Scheme | None = None, *, decodes: bool = False, reads: bool = False) -> Student:
    network = JoinedHeads(decodes=decodes, reads=reads).eval()
    return insert_quantizers(prepare(capture(network, images(2))), scheme or Scheme(runtime=runtime))


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("runtime", TARGETS)
def test_boxes_and_scores_that_are_joined_share_no_grid(runtime: str, decodes: bool) -> None:
    made = heads(runtime, decodes=decodes)
    ends = ("boxes.0", "sigmoid", "boxes.1", "sigmoid_1")
    assert len({quantizer_after(made, name) for name in ends} - {None}) == 4
    listed = {u.name: u.reason for u in made.unquantized}
    assert "share no grid" in listed["cat"]
    assert "share no grid" in listed["cat_1"]
    assert {"mul", "exp", "mul_1"} <= listed.keys() or not decodes
    assert "output of the network" in listed["cat_3" if decodes else "cat_2"]


def test_what_a_layer_reads_or_a_rule_names_has_a_grid_all_the_same() -> None:
    assert quantizer_after(heads("generic", reads=True), "cat") == quantizer_after(
        heads("generic", reads=True), "sigmoid"
    )
    named = heads("generic", Scheme(rules=(Rule.parse("cat=a16"),)))
    assert named.quantizer(str(quantizer_after(named, "cat"))).grid.bits == 16
    assert quantizer_after(named, "cat_1") is None


def over_zeros(boxes: Tensor, scores: Tensor) -> Tensor:
    found = boxes.new_zeros(len(boxes), 9, *boxes.shape[2:])
    found[:, :4] = boxes
    found[:, 4:] = scores
    return found


def over_a_part(boxes: Tensor, scores: Tensor) -> Tensor:
    found = torch.cat([scores.mean(1, keepdim=True)] * 4 + [scores], 1) + 0 * scores[:, :1]
    found[:, torch.arange(4)] = boxes
    return found


def by_a_mask(boxes: Tensor, scores: Tensor) -> Tensor:
    ninth = torch.arange(9).reshape(1, 9, 1, 1)
    return torch.where(ninth < 4, boxes.repeat(1, 3, 1, 1)[:, :9], scores.repeat(1, 2, 1, 1)[:, :9])


def filled_up(boxes: Tensor, scores: Tensor) -> Tensor:
    return F.pad(boxes, (0, 0, 0, 0, 0, 5)) + F.pad(scores, (0, 0, 0, 0, 4, 0))


def by_factors(boxes: Tensor, scores: Tensor) -> Tensor:
    del boxes
    return torch.tensor([1.0, 1, 1, 64, 64]).reshape(5, 1, 1) * scores


def to_its_place(boxes: Tensor, scores: Tensor) -> Tensor:
    del scores
    return boxes + torch.arange(64.0).reshape(8, 8)


class Joined(nn.Module):
    """Boxes and scores of one level, joined in a way of one's own; half of the outputs are then read by a layer."""

    def __init__(self, joins: Callable[[Tensor, Tensor], Tensor], *, reads: bool) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.joins, self.reads = joins, reads

    def forward(self, x: Tensor) -> Tensor:
        found = self.joins(self.boxes(x).exp(), self.scores(x).sigmoid())
        if self.reads:
            found = F.conv2d(found, torch.ones(2, found.shape[1], 1, 1))
        return found.clamp(0.0, 0.9).exp()


JOINS = {"slice_scatter": over_zeros, "index_put": over_a_part, "where": by_a_mask, "add": filled_up}
JOINS |= {"mul": by_factors, "add_": to_its_place}


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("operator", JOINS)
def test_boxes_and_scores_share_no_grid_however_they_are_joined(operator: str, reads: bool) -> None:
    network = Joined(JOINS[operator], reads=reads).eval()
    made = insert_quantizers(prepare(capture(network, torch.randn(2, 3, 8, 8))), Scheme())
    joined = [n for n in made.graph.graph.nodes if ops.base_name(n) == operator.strip("_")][-1]
    listed = {u.name: u.reason for u in made.unquantized}
    reason = listed.get(str(joined.meta["layer"]), "")
    assert ("share no grid" in reason) != reads


def test_outputs_stay_float_unless_asked() -> None:
    network = Outputs(tuple).eval()
    teacher = prepare(capture(network, images(2)))
    listed = {u.name: u.reason for u in insert_quantizers(teacher, Scheme()).unquantized}
    assert listed["head"] == listed["aux"] == "output of the network, left in float"
    asked = insert_quantizers(teacher, Scheme(outputs=True))
    assert quantizer_after(asked, "head")
    assert quantizer_after(asked, "aux")


def test_macs_and_parameters_of_layers() -> None:
    rows = {r.name: r for r in student("transposed", "onnxruntime").layers}
    # positions x kernel x channels of one group, one image: 8x8 in, 16x16, 16x16 -> 32x32
    assert rows["plain"].macs == 8 * 8 * 3 * 4 * 2 * 2
    assert rows["grouped"].macs == 16 * 16 * 4 * 3 * 3 * 3
    assert rows["depthwise"].macs == 16 * 16 * 6 * 1 * 3 * 3
    assert rows["grouped"].parameters == 4 * 3 * 9 + 6
    rows = {r.name: r for r in student("conv_bn_relu6", "onnxruntime").layers}
    assert (rows["0"].macs, rows["4"].macs) == (4 * 4 * 6 * 27, 96 * 4)


def test_inserting_changes_neither_teacher_nor_captured_graph() -> None:
    teacher = prepared("transformer").graph
    before, code = {k: v.clone() for k, v in teacher.state_dict().items()}, str(teacher.graph)
    made = insert_quantizers(prepared("transformer"), Scheme(weights=2))
    Calibrate(bias_correction="analytic").run(made, prepared("transformer"), dataset(4), Run())
    made.freeze()
    after = teacher.state_dict()
    assert str(teacher.graph) == code
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not [m for m in captured("transformer").graph.modules() if isinstance(m, Quantizer)]


class _UsedBothWays(nn.Module):
    """A matrix that is a layer's weight and an operand of an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + x * self.fc.weight).mean((1, 2))


def test_a_weight_that_is_an_operand_too_is_not_forgotten() -> None:
    made = insert_quantizers(prepare(capture(_UsedBothWays(), images(2))), Scheme())
    assert floats_without_a_word(made) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("runtime", TARGETS)
def test_bits_are_told_without_inserting_quantizers(name: str, runtime: str) -> None:
    scheme = Scheme(weights=4, activations=8, runtime=runtime)
    made = insert_quantizers(prepared(name), scheme)
    told = bits_by_key(prepared(name).graph, scheme)
    for layer in made.layers:
        for key in (layer.weight, layer.activation):
            assert key is None or told[key] == made.quantizer(key).grid.bits
