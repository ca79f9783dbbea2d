"""Blocks: what people call a block, written down by hand from each network's own code, is what the graph shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Attention, images, make, prepared
from torch import Tensor, fx, nn

from bitwright.errors import UsageError
from bitwright.given.compat import import_timm, import_torchvision
from bitwright.given.models import load_model
from bitwright.graph import ops
from bitwright.graph.blocks import Block, find_blocks
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Scheme

Found = list[tuple[str, str]]
"""(kind, layers) of each block."""


def teacher(network: nn.Module, size: int = 8, channels: int = 3) -> Captured:
    generator = torch.Generator().manual_seed(0)
    return prepare(capture(network.eval(), torch.randn(2, channels, size, size, generator=generator)))


def blocks_of(network: nn.Module, size: int = 8) -> Found:
    torch.manual_seed(0)
    graph = teacher(network, size).graph
    return short(checked(graph))


def checked(graph: fx.GraphModule) -> list[Block]:
    """The blocks, once what holds for all networks was checked."""
    found = find_blocks(graph)
    order = [n.name for n in graph.graph.nodes if ops.base_name(n) in ops.LINEAR and n.op == "call_function"]
    assert sorted(n for b in found for n in b.nodes) == sorted(order)
    assert [b.nodes for b in found] == [tuple(sorted(b.nodes, key=order.index)) for b in found]
    firsts = [order.index(b.nodes[0]) for b in found]
    assert firsts == sorted(firsts)
    assert len({b.name for b in found}) == len(found)
    layers = {n.name: n.meta["layer"] for n in graph.graph.nodes if n.name in order}
    assert all(b.layers == tuple(layers[n] for n in b.nodes) for b in found)
    assert find_blocks(graph) == found
    return found


def short(found: list[Block]) -> Found:
    return [(b.kind, " ".join(b.layers)) for b in found]


def pick(found: list[Block], kind: str) -> list[str]:
    return [" ".join(b.layers) for b in found if b.kind == kind]


# ----------------------------------------------------------------------------------------------- tiny networks

EXPECTED: dict[str, Found] = {
    "conv_bn_relu6": [("chain", "0 4")],
    "squeeze_excite": [("residual", "expand depthwise reduce excite project"), ("chain", "head")],
    "transposed": [("chain", "plain grouped depthwise")],
    "residual": [("chain", "stem"), ("residual", "conv"), ("chain", "head")],
    "transformer": [
        ("chain", "patches"),
        ("attention", "attention.qkv attention.proj"),
        ("mlp", "mlp.0 mlp.2"),
        ("chain", "head"),
    ],
    "relative_position": [("chain", "patches"), ("attention", "qkv"), ("chain", "head")],
    "shifted_window": [("chain", "patches"), ("attention", "qkv"), ("chain", "head")],
    "mixer": [
        ("chain", "patches"),
        ("token mixer", "tokens.0 tokens.3"),
        ("channel mixer", "channels.0 channels.2"),
        ("chain", "head"),
    ],
    "layer_scale": [("chain", "stem"), ("residual", "depthwise fc1 fc2"), ("residual", "pointwise")],
    "dense": [("chain", "conv1"), ("chain", "conv2"), ("chain", "head")],
    "tuple_output": [("chain", "stem head"), ("chain", "aux")],
    "in_place": [("chain", "conv1"), ("residual", "conv2")],
}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_lies_in_one_block(name: str) -> None:
    found = checked(prepared(name).graph)
    if name in EXPECTED:
        assert short(found) == EXPECTED[name]


def test_names_are_the_paths_that_layers_share() -> None:
    names = [b.name for b in find_blocks(prepared("transformer").graph)]
    assert names == ["patches", "attention", "mlp", "head"]
    assert find_blocks(prepared("squeeze_excite").graph)[0].name == "expand..project"

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({n: nn.Conv2d(3, 3, 1) for n in "abcd"})
            self.body_1 = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.body["b"](self.body["a"](x))
            return self.body_1(F.relu(x + self.body["d"](self.body["c"](x)))).mean((2, 3))

    assert [b.name for b in find_blocks(teacher(Nested()).graph)] == ["body", "body_2", "body_1"]


@pytest.mark.parametrize("name", ["transformer", "mixer", "shifted_window", "squeeze_excite", "dense", "multi_head"])
def test_the_student_has_the_teachers_blocks(name: str) -> None:
    student = insert_quantizers(prepared(name), Scheme())
    assert find_blocks(student.graph) == find_blocks(prepared(name).graph)


def test_a_graph_without_shapes_is_refused() -> None:
    bare = fx.Graph()
    bare.output([bare.placeholder("x")])
    with pytest.raises(UsageError, match="Expected a graph with shapes"):
        find_blocks(fx.GraphModule(nn.Module(), bare))


# ----------------------------------------------------------------------------------------------- kinds of attention


class Tokens(nn.Module):
    """Patches, something on [B, 4, 8], head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(3, 8, 4, stride=4), body, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, 2, 4).transpose(1, 2)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class TalkingHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1) / 2).permute(0, 2, 3, 1)
        scores = self.after(self.before(scores).softmax(2)).permute(0, 3, 1, 2)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class LocalPosition(nn.Module):
    """Separate projections, rotated queries, and a convolution of the values beside the attention (LePE)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.lepe = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.register_buffer("angle", torch.rand(4, 8))

    def rotate(self, x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * self.angle.cos() + turned * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.rotate(self.q(x))), heads(self.rotate(self.k(x))), self.v(x)
        local = self.lepe(v.transpose(1, 2).reshape(-1, 8, 2, 2)).flatten(2).transpose(1, 2)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ heads(v)
        return self.proj(F.hardswish(y.transpose(1, 2).flatten(2) + local))


class ConvProjections(nn.Module):
    """Depthwise before pointwise, for each of query, key and value, the last two on a smaller map (as in CvT)."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, s, 1, groups=8) for s in (1, 2, 2))
        self.pointwise = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).reshape(-1, 8, 2, 2)
        made = [p(d(maps).flatten(2).transpose(1, 2)) for d, p in zip(self.depthwise, self.pointwise, strict=True)]
        q, k, v = (heads(t) for t in made)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class RelativeTables(nn.Module):
    """Scores from products of queries with stored tables (as in BoTNet), no projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rows = nn.Linear(8, 24), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) + q @ self.rows
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Parallel(nn.Module):
    """Attention and an MLP of the same norm, added at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y) + self.fc2(F.gelu(self.fc1(y)))


class Linearised(nn.Module):
    """A softmax, but no product before it: not attention by our definition."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.proj = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return self.proj(v @ (k.softmax(1).transpose(1, 2) @ v))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (TalkingHeads, [("attention", "qkv before after proj")]),
        (LocalPosition, [("attention", "q k v lepe proj")]),
        (
            ConvProjections,
            [
                (
                    "attention",
                    "depthwise.0 pointwise.0 depthwise.1 pointwise.1 depthwise.2 pointwise.2 proj",
                )
            ],
        ),
        (RelativeTables, [("attention", "qkv rows")]),
        (Linearised, [("residual", "kv proj")]),
    ],
)
def test_attention_of_many_forms(body: type[nn.Module], expected: Found) -> None:
    found = blocks_of(Tokens(Residual(body())))
    inner = [(kind, " ".join(n.removeprefix("body.inner.") for n in names.split())) for kind, names in found]
    assert inner == [("chain", "patches"), *expected, ("chain", "head")]


def test_attention_beside_an_mlp() -> None:
    assert blocks_of(Tokens(Parallel())) == [
        ("chain", "patches"),
        ("attention", "body.attention.qkv body.attention.proj"),
        ("mlp", "body.fc1 body.fc2"),
        ("chain", "head"),
    ]


class NoValues(nn.Module):
    """Attention that averages its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ x)


def test_attention_takes_no_layer_from_the_block_before() -> None:
    mlp = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))
    assert blocks_of(Tokens(nn.Sequential(Residual(mlp), Residual(NoValues())))) == [
        ("chain", "patches"),
        ("mlp", "body.0.inner.0 body.0.inner.2"),
        ("attention", "body.1.inner.q body.1.inner.k body.1.inner.proj"),
        ("chain", "head"),
    ]


def test_attention_without_a_residual_then_an_mlp() -> None:
    """The projection is the first layer behind; what is behind that is another block."""
    body = nn.Sequential(Attention(), Residual(nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))))
    assert blocks_of(Tokens(body)) == [
        ("chain", "patches"),
        ("attention", "body.0.qkv body.0.proj"),
        ("mlp", "body.1.inner.0 body.1.inner.2"),
        ("chain", "head"),
    ]


# ----------------------------------------------------------------------------------------------- the other kinds


class Gated(nn.Module):
    """A gating unit over positions (as in gMLP) and a layer that reads no image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.spatial, self.fc2 = nn.Linear(8, 16), nn.Linear(4, 4), nn.Linear(8, 8)
        self.table, self.embed = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 8)
        self.register_buffer("index", torch.tensor([0, 1, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.fc1(x + self.embed(self.table[self.index])).chunk(2, -1)
        return self.fc2(u * self.spatial(v.transpose(1, 2)).transpose(1, 2))


def test_a_gate_over_positions_is_a_token_mixer() -> None:
    found = blocks_of(Tokens(Residual(Gated())))
    names = "body.inner.embed body.inner.fc1 body.inner.spatial body.inner.fc2"
    assert found[1:-1] == [("token mixer", names)]


class Nest(nn.Module):
    """A residual branch inside another, a gate without a residual, and branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.down, self.reduce, self.excite, self.project = (
            nn.Conv2d(4, 4, 3, 2, 1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 1),
        )
        self.left, self.right1, self.right2 = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        y = self.c(F.relu(y + self.b(y)))
        x = F.relu(self.down(x + y))
        x = self.project(x * self.excite(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid())
        x = torch.cat([self.left(x), self.right2(F.relu(self.right1(x)))], 1)
        return self.head(x.mean((2, 3)))


def test_inner_branches_come_first_and_chains_part_where_the_data_does() -> None:
    assert blocks_of(Nest()) == [
        ("chain", "stem"),
        ("residual", "a c"),
        ("residual", "b"),
        ("chain", "down reduce excite project left"),
        ("chain", "right1 right2"),
        ("chain", "head"),
    ]


# ----------------------------------------------------------------------------------------------- whole networks


def zoo(name: str) -> list[Block]:
    network: Any = load_model(f"zoo:{name}").module
    return checked(teacher(network, 28, channels=1).graph)


def test_the_zoos_transformer() -> None:
    expected: Found = [("chain", "patch_embed.proj")]
    for i in range(4):
        expected += [
            ("attention", f"blocks.{i}.attn.qkv blocks.{i}.attn.proj"),
            ("mlp", f"blocks.{i}.mlp.fc1 blocks.{i}.mlp.fc2"),
        ]
    found = zoo("fashion_vit")
    assert short(found) == [*expected, ("chain", "head")]
    assert [b.name for b in found][1:3] == ["blocks.0.attn", "blocks.0.mlp"]


def test_the_zoos_convolutional_network() -> None:
    def inverted(at: str, squeeze: bool = False) -> str:
        parts = ["expand.conv", "depthwise.conv", *(["se.reduce", "se.expand"] if squeeze else []), "project.conv"]
        return " ".join(f"{at}.{p}" for p in parts)

    assert short(zoo("fashion_cnn")) == [
        ("chain", f"stem.conv {inverted('stage1.0')}"),
        ("residual", inverted("stage1.1")),
        ("residual", inverted("stage2.0")),
        ("chain", inverted("stage2.1")),
        *[("residual", inverted(f"stage3.{i}", squeeze=True)) for i in range(3)],
        ("chain", "head.conv classifier"),
    ]


def timm_or_skip() -> Any:
    try:
        return import_timm()
    except ImportError:
        pytest.skip("timm is not installed")


def timm(name: str, size: int = 224, **settings: Any) -> list[Block]:
    torch.manual_seed(0)
    network = timm_or_skip().create_model(name, pretrained=False, **settings)
    return checked(teacher(network, size).graph)


def pairs(at: str, first: str, last: str) -> str:
    return f"{at}.{first} {at}.{last}"


def test_deit() -> None:
    found = timm("deit_tiny_patch16_224", 64, img_size=64, depth=3, num_classes=5)
    assert pick(found, "attention") == [pairs(f"blocks.{i}.attn", "qkv", "proj") for i in range(3)]
    assert pick(found, "mlp") == [pairs(f"blocks.{i}.mlp", "fc1", "fc2") for i in range(3)]
    assert pick(found, "chain") == ["patch_embed.proj", "head"]


def test_swin() -> None:
    small: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 12, "num_heads": (1, 2)}
    found = timm("swin_tiny_patch4_window7_224", 64, depths=(2, 1), num_classes=5, **small)
    at = [f"layers.{i}.blocks.{j}" for i, n in enumerate((2, 1)) for j in range(n)]
    assert pick(found, "attention") == [pairs(f"{a}.attn", "qkv", "proj") for a in at]
    assert pick(found, "mlp") == [pairs(f"{a}.mlp", "fc1", "fc2") for a in at]
    assert pick(found, "chain") == ["patch_embed.proj", "layers.1.downsample.reduction", "head.fc"]
    assert len(found) == 9


def test_swin_of_the_second_version() -> None:
    """Normalised queries and keys, positions from a network of their own, normalisation behind the branch."""
    small: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 12, "num_heads": (1, 2)}
    found = timm("swinv2_tiny_window8_256", 64, depths=(2, 1), num_classes=5, **small)
    at = [f"layers.{i}.blocks.{j}" for i, n in enumerate((2, 1)) for j in range(n)]
    assert pick(found, "attention") == [pairs(f"{a}.attn", "qkv", "proj") for a in at]
    assert pick(found, "mlp") == [pairs(f"{a}.mlp", "fc1", "fc2") for a in at]
    assert pick(found, "chain") == ["patch_embed.proj", "layers.1.downsample.reduction", "head.fc"]
    assert all(b.closing for b in found if b.kind in {"attention", "mlp"})


def test_torchvisions_swin_of_the_second_version() -> None:
    try:
        swin = import_torchvision().models.swin_transformer
    except ImportError:
        pytest.skip("torchvision is not installed")
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    network = swin.SwinTransformer([4, 4], 12, [2, 1], [1, 2], [4, 4], num_classes=5, **parts)
    found = checked(teacher(network, 64).graph)
    at = ["features.1.0", "features.1.1", "features.3.0"]
    assert pick(found, "attention") == [pairs(f"{a}.attn", "qkv", "proj") for a in at]
    assert pick(found, "mlp") == [pairs(f"{a}.mlp", "0", "3") for a in at]
    assert pick(found, "chain") == ["features.0.0", "features.2.reduction", "head"]


def test_levit() -> None:
    found = timm("levit_128s", depth=(1, 1, 1))
    at = [f"stages.{i}.blocks.{j}" for i, n in enumerate((1, 1, 1)) for j in range(n)]
    attention = [pairs(f"{a}.attn", "qkv.linear", "proj.ln.linear") for a in at]
    for i in (1, 2):
        base = f"stages.{i}.downsample.attn_downsample"
        attention.append(f"{base}.kv.linear {base}.q.ln.linear {base}.proj.ln.linear")
    assert sorted(pick(found, "attention")) == sorted(attention)
    mlps = [pairs(f"{a}.mlp", "ln1.linear", "ln2.linear") for a in [*at, "stages.1.downsample", "stages.2.downsample"]]
    assert sorted(pick(found, "mlp")) == sorted(mlps)
    assert pick(found, "chain") == [" ".join(f"stem.conv{i}.linear" for i in (1, 2, 3, 4))]
    assert pick(found, "residual") == ["head.linear head_dist.linear"]  # two heads, averaged


@pytest.mark.slow
def test_mobilevit() -> None:
    found = timm("mobilevit_xxs", 128)
    at = [f"stages.{i}.1.transformer.{j}" for i, n in ((2, 2), (3, 4), (4, 3)) for j in range(n)]
    assert pick(found, "attention") == [pairs(f"{a}.attn", "qkv", "proj") for a in at]
    assert pick(found, "mlp") == [pairs(f"{a}.mlp", "fc1", "fc2") for a in at]
    inverted = ["conv1_1x1.conv", "conv2_kxk.conv", "conv3_1x1.conv"]
    assert pick(found, "residual") == [" ".join(f"stages.{a}.{c}" for c in inverted) for a in ("0.0", "1.1", "1.2")]


def test_mlp_mixer() -> None:
    network = timm_or_skip().models.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=3, embed_dim=16)
    found = checked(teacher(network, 32).graph)
    assert pick(found, "token mixer") == [pairs(f"blocks.{i}.mlp_tokens", "fc1", "fc2") for i in range(3)]
    assert pick(found, "channel mixer") == [pairs(f"blocks.{i}.mlp_channels", "fc1", "fc2") for i in range(3)]
    assert pick(found, "chain") == ["stem.proj", "head"]


def test_resnet() -> None:
    expected: Found = [("chain", "conv1")]
    for i in range(1, 5):
        down = f" layer{i}.0.downsample.0" if i > 1 else ""
        expected += [("residual", pairs(f"layer{i}.0", "conv1", "conv2") + down)]
        expected += [("residual", pairs(f"layer{i}.1", "conv1", "conv2"))]
    found = timm("resnet18", 64)
    assert short(found) == [*expected, ("chain", "fc")]
    assert [b.name for b in found][:3] == ["conv1", "layer1.0", "layer1.1"]


@pytest.mark.slow
def test_efficientnet() -> None:
    """Blocks that halve the map have no residual: each is a chain, the first and the last with their neighbours."""
    found = timm("efficientnet_lite0", 64)
    inverted = ["conv_pw", "conv_dw", "conv_pwl"]
    after = [(i, j) for i, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(1, n)]
    assert pick(found, "residual") == [" ".join(f"blocks.{i}.{j}.{c}" for c in inverted) for i, j in after]
    first, *middle, last = pick(found, "chain")
    assert first.split()[:3] == ["conv_stem", "blocks.0.0.conv_dw", "blocks.0.0.conv_pw"]
    assert first.split()[3:] == [f"blocks.1.0.{c}" for c in inverted]
    assert middle == [" ".join(f"blocks.{i}.0.{c}" for c in inverted) for i in (2, 3, 4, 5)]
    assert last.split() == [*(f"blocks.6.0.{c}" for c in inverted), "conv_head", "classifier"]


def test_convnext() -> None:
    found = timm("convnext_atto", 64, depths=(1, 2, 1, 1))
    at = [f"stages.{i}.blocks.{j}" for i, n in enumerate((1, 2, 1, 1)) for j in range(n)]
    assert pick(found, "residual") == [f"{a}.conv_dw {a}.mlp.fc1 {a}.mlp.fc2" for a in at]
    assert pick(found, "chain") == ["stem.0", *(f"stages.{i}.downsample.1" for i in (1, 2, 3)), "head.fc"]


def test_densenet() -> None:
    """Each concatenation begins a block; the first dense layer reads the stem or the transition alone."""
    found = timm("densenet121", 64, block_config=(2, 3))
    block1, block2 = "features.denseblock1.denselayer", "features.denseblock2.denselayer"
    assert short(found) == [
        ("chain", f"features.conv0 {block1}1.conv1 {block1}1.conv2"),
        ("chain", f"{block1}2.conv1 {block1}2.conv2"),
        ("chain", f"features.transition1.conv {block2}1.conv1 {block2}1.conv2"),
        ("chain", f"{block2}2.conv1 {block2}2.conv2"),
        ("chain", f"{block2}3.conv1 {block2}3.conv2"),
        ("chain", "classifier"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "members", "count"),
    [
        ("xcit_nano_12_p16_224", "attention", {"qkv proj", "q k v proj"}, 14),
        ("cait_xxs24_224", "attention", {"qkv proj_l proj_w proj", "q k v proj"}, 26),
        ("pvt_v2_b0", "attention", {"q sr kv proj", "q kv proj"}, 8),
        ("beit_base_patch16_224", "attention", {"qkv proj"}, 12),
        ("volo_d1_224", "attention", {"qkv proj", "kv q proj"}, 16),
        ("gmlp_ti16_224", "token mixer", {"fc1 proj fc2"}, 30),
        ("resmlp_12_224", "token mixer", {"linear_tokens"}, 12),
        ("regnety_002", "residual", {"conv conv fc1 fc2 conv", "conv conv fc1 fc2 conv conv"}, 13),
    ],
)
def test_more_families(name: str, kind: str, members: set[str], count: int) -> None:
    found = [b for b in timm(name) if b.kind == kind]
    assert len(found) == count
    assert {" ".join(x.rpartition(".")[2] for x in b.layers) for b in found} == members


def test_nothing_is_changed() -> None:
    captured = prepare(capture(make("transformer"), images(2)))
    before = str(captured.graph.graph)
    find_blocks(captured.graph)
    assert str(captured.graph.graph) == before
