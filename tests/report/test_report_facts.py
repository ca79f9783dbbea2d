"""What the report gathers, against plain counting with numpy, and the files as they lie on disk."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import dataset, model
from onnx import TensorProto, load
from PIL import Image
from torch import Tensor

import bitwright as bw
from bitwright import zoo
from bitwright.given.images import load_images
from bitwright.given.preprocessing import Preprocessing
from bitwright.graph import rewrite
from bitwright.graph.readings import Reading
from bitwright.graph.student import Student
from bitwright.graph.watch import watch
from bitwright.measure.evaluation import evaluation_of, read_outputs_of
from bitwright.report.answers import Answers, class_names, picture
from bitwright.report.facts import onnx_parts, packed_parts
from bitwright.report.histograms import histograms, worst_layers
from bitwright.report.verdict import paired_difference
from bitwright.run.result import LayerRow


@pytest.fixture(scope="module")
def quantized() -> Student:
    return bw.quantize(model("residual"), dataset(24), recipe="mse", weights=3, activations=4)


def scores(count: int, seed: int, offset: Tensor | float = 0.0) -> Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed)) + offset


def test_answers_are_counted_as_by_hand() -> None:
    theirs = scores(60, 0)
    ours = theirs + 0.8 * scores(60, 1)
    labels = torch.where(torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.7, theirs.argmax(1), 3)
    found = Answers(shown=4)
    for start in range(0, 60, 16):
        part = slice(start, start + 16)
        found.update(start, [theirs[part]], [ours[part]], labels[part])
    a, b, y = (t.numpy() for t in (theirs.argmax(1), ours.argmax(1), labels))
    assert (found.count, found.differing) == (60, int((a != b).sum()))
    cells = {
        (True, True): found.both, (True, False): found.only_float,
        (False, True): found.only_quantized, (False, False): found.neither,
    }  # fmt: skip
    for (right, still), count in cells.items():
        assert count == int(((a == y) == right)[(b == y) == still].sum())
    p, q = (np.exp(t.double().numpy()) for t in (theirs, ours))
    p, q = (t / t.sum(1, keepdims=True) for t in (p, q))
    lost = [(p[i, a[i]] - q[i, a[i]], i) for i in range(60) if a[i] != b[i]]
    assert [d.position for d in found.worst] == [i for _, i in sorted(lost, reverse=True)[:4]]
    first = found.worst[0]
    assert (first.before.number, first.after.number) == (a[first.position], b[first.position])
    assert first.after.probability == pytest.approx(q[first.position, first.after.number], rel=1e-5)


def test_an_evaluation_shows_its_batches_and_agrees_with_itself(quantized: Student) -> None:
    answers, images = Answers(), dataset(40, seed=9)
    readings = read_outputs_of(quantized, images)
    found = evaluation_of(quantized, images, readings, batch=7, each=answers.update)
    assert answers.count == 40
    assert 1 - answers.differing / 40 == pytest.approx(found.outputs["output"].agreement)
    facts = answers.facts(images, pictures=True)
    assert facts is not None
    assert facts.labelled is None


def test_of_several_outputs_the_one_that_changed_is_named() -> None:
    first, second = scores(30, 0), scores(30, 1)
    ruined = second.roll(1, 1)
    found = Answers(("kind", "colour"), (Reading("scores", 1), Reading("scores", 1)))
    found.update(0, [first, second], [first, ruined], None)
    assert (found.count, found.differing) == (30, 30)
    assert {d.output for d in found.worst} == {"colour"}
    facts = found.facts(dataset(30), pictures=False)
    assert facts is not None
    assert {row.output for row in facts.shown or []} == {"colour"}
    alone = Answers(("kind", "embedding"), (Reading("scores", 1), Reading("values")))
    alone.update(0, [first, second], [first.roll(1, 1), ruined], torch.zeros(30, dtype=torch.int64))
    assert alone.labelled
    assert {d.output for d in alone.worst} == {None}


def test_networks_without_classes_have_no_answers() -> None:
    found = Answers()
    found.update(0, [torch.zeros(2, 3, 8, 8)], [torch.zeros(2, 3, 8, 8)], None)
    assert found.facts(dataset(2), pictures=True) is None


def test_the_interval_of_the_difference_covers_as_often_as_it_says() -> None:
    """Simulated: of 2,000 draws of 400 images, 95 % of intervals hold the true difference."""
    generator = np.random.default_rng(0)
    chances = {"both": 0.85, "only_float": 0.06, "only_quantized": 0.03, "neither": 0.06}
    held = 0
    for counts in generator.multinomial(400, list(chances.values()), size=2000):
        _, low, high = paired_difference(dict(zip(chances, map(int, counts), strict=True)))
        held += low <= 0.03 - 0.06 <= high
    assert 0.935 < held / 2000 < 0.97


def test_histograms_are_those_of_numpy(quantized: Student) -> None:
    images = dataset(6).batch(range(6))
    layers = [x for x in quantized.layers if x.weight is not None]
    found = histograms(quantized, images, layers)
    assert quantized.teacher is not None
    graph = quantized.teacher.graph
    nodes = {n.name: n for n in graph.graph.nodes}
    for layer, data in zip(layers, found, strict=True):
        weight = rewrite.get_tensor(graph, str(nodes[layer.node].args[1].target)).numpy()
        quantizer = quantized.quantizer(layer.weight or "")
        steps = weight / quantizer.scale.numpy().reshape(-1, *[1] * (weight.ndim - 1))
        seen = data.weight
        assert seen is not None
        counts, _ = np.histogram(steps, bins=len(seen.counts), range=tuple(seen.range))
        assert np.abs(counts - seen.counts).sum() <= 2  # a value on an edge may fall to either side
        assert sum(seen.counts) == weight.size
        assert seen.levels == [-4, 3]
        assert seen.below == pytest.approx((steps < -4.5).mean())
        assert seen.above == pytest.approx((steps > 3.5).mean())
        assert seen.used is not None
        assert 1 < seen.used <= 8
        if data.activation is None:
            continue
        kept: dict[str, Tensor] = {}
        watch(graph, images, {layer.end or layer.node: lambda n, v, kept=kept: kept.update({n.name: v.clone()})})
        (value,) = kept.values()
        assert data.activation.seen == pytest.approx([float(value.min()), float(value.max())])
        assert sum(data.activation.counts) == value.numel()


def test_the_worst_layers_are_the_noisiest_each_group_once() -> None:
    layers = [
        SimpleNamespace(name=n, node=n, end=e, weight="w", activation="a")
        for n, e in (("a", "a"), ("b", "d"), ("c", None), ("d", "d"))
    ]
    rows = [LayerRow("layer", sqnr_db=v) for v in (20.0, 5.0, None, 4.0)]
    assert [x.name for x in worst_layers(rows, layers, count=3)] == ["d", "a"]  # type: ignore[arg-type]


def test_parts_of_the_files_add_up(quantized: Student, tmp_path: Path) -> None:
    quantized.save(tmp_path / "run")
    quantized.export(tmp_path / "run" / "model.onnx", dataset(4))
    packed, onnx = packed_parts(tmp_path / "run" / "model.safetensors"), onnx_parts(tmp_path / "run" / "model.onnx")
    assert packed is not None
    assert onnx is not None
    assert sum(packed.values()) == (tmp_path / "run" / "model.safetensors").stat().st_size
    assert sum(onnx.values()) == (tmp_path / "run" / "model.onnx").stat().st_size
    assert packed["codes"] < onnx["int4"]
    widths = {"int4": 4, "int8": 8, "uint8": 8, "int32": 32, "float": 32}
    expected: dict[str, int] = {}
    for tensor in load(tmp_path / "run" / "model.onnx").graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        expected[kind] = expected.get(kind, 0) + -(-math.prod(tensor.dims) * widths.get(kind, 64) // 8)
    assert {k: onnx[k] for k in widths if k in expected} == {k: expected[k] for k in widths if k in expected}
    assert packed_parts(tmp_path / "none") is None
    assert onnx_parts(tmp_path / "none") is None


def test_a_picture_has_the_pixels_of_the_image() -> None:
    pixels, _ = zoo.images("fashion")
    how = Preprocessing(**zoo.preprocessing("fashion_cnn"))
    images = load_images("zoo:fashion[3:4]", how)
    kind, _, data = picture(images[0], how).partition(";base64,")
    assert kind == "data:image/png"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(found, pixels[3, :, :, 0])


def test_large_pictures_are_small_and_keep_their_proportions() -> None:
    how = Preprocessing(input_size=(3, 240, 480))
    wide = torch.linspace(0, 1, 480).expand(3, 240, 480)
    kind, _, data = picture(wide, how).partition(";base64,")
    assert kind == "data:image/jpeg"
    made = Image.open(io.BytesIO(base64.b64decode(data)))
    assert made.size == (112, 56)
    assert len(data) < 8000
    assert np.asarray(made)[:, 0].mean() < 20 < 235 < np.asarray(made)[:, -1].mean()


def test_tensors_without_known_preprocessing_are_stretched() -> None:
    _, _, data = picture(torch.tensor([[[-3.0, 5.0], [1.0, 1.0]]]), None).partition(";base64,")
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).tolist() == [[0, 255], [128, 128]]


@pytest.mark.parametrize("names", [["a/1.png", "2.png"], ["a/1.png", "a/2.png"], ["a/1.png", "b/2.png", "c/3.png"]])
def test_folders_that_are_no_classes_name_none(names: list[str]) -> None:
    images = load_images(torch.zeros(len(names), 3, 8, 8), None).labelled([0, 1, 0][: len(names)])
    images.names = names
    assert class_names(images) == {}
