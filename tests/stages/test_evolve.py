"""Evolution of scales: what it may change, what it must reach, survive and repeat."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import dataset, images, prepared
from torch import Tensor, nn

from bitwright.errors import BitwrightError, UsageError
from bitwright.export.packed import load_packed, save_packed
from bitwright.given.images import Images, load_images
from bitwright.graph import rewrite
from bitwright.graph.blocks import find_blocks
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Snapshot, Student, insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe, builtin_recipes
from bitwright.stages import evolve as module
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters
from bitwright.stages.candidates import Batches, Evaluator, Fitness, Scales
from bitwright.stages.evolve import Evolve
from bitwright.stages.population import CYCLES, POPULATION, TOURNAMENT, Mutation
from bitwright.stages.reconstruct import Reconstruct

CALIBRATE = Calibrate(weights="mse", activations="minmax", bias_correction="analytic")
QUICK: dict[str, Any] = {"passes": 2, "batch": 8, "images": 24, "mutation": Mutation(size=0.05, share=1.0)}


def start(name: str | Captured = "transformer", bits: int = 3) -> tuple[Student, Captured, Images]:
    teacher = prepared(name) if isinstance(name, str) else name
    shape = tuple(teacher.example.shape[1:])
    noise = torch.randn(24, *shape, generator=torch.Generator().manual_seed(2))
    data = dataset(24) if shape == tuple(images(1).shape[1:]) else load_images(noise, None)
    student = insert_quantizers(teacher, Scheme(weights=bits, activations=8))
    return CALIBRATE.run(student, teacher, data, Run()), teacher, data


def evolve(
    stage: Evolve, name: str | Captured = "transformer", *, bits: int = 3, **settings: Any
) -> tuple[Student, Snapshot, dict[str, Any]]:
    """The student, the state it came in, and what the stage noted."""
    student, teacher, data = start(name, bits)
    before = student.snapshot()
    run = Run(**{"seed": 1, "precision": "float32", **settings})
    student = stage.run(student, teacher, data, run)
    return student, before, run.records[-1].told()


def same(a: Snapshot, b: Snapshot) -> bool:
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def changed(a: Snapshot, b: Snapshot) -> set[str]:
    return {k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])}


@pytest.mark.parametrize("measure", ["infonce", "mse", "cosine", "kl"])
def test_fitness_falls_and_never_rises_on_the_way(measure: Any) -> None:
    _, _, notes = evolve(Evolve(**QUICK, fitness=measure))
    curve = [fitness for _, fitness in notes["curve"]]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < curve[0]
    assert notes["fitness"]["after"] == curve[-1] < notes["fitness"]["before"]
    assert notes["fitness"]["teacher"] < notes["fitness"]["after"]


def test_the_noted_fitness_is_that_of_the_whole_network() -> None:
    student, teacher, data = start()
    run = Run(seed=1, precision="float32")
    stage = Evolve(**QUICK)
    stage.run(student, teacher, data, run)
    batches = Batches(teacher, data.sample(24, seed=1), 8, run, "")
    losses = batches.losses(student.flat, Fitness())
    assert run.records[-1].told()["fitness"]["after"] == pytest.approx(float(losses.double().mean()), abs=1e-9)


@pytest.mark.parametrize("memory", [0, 20_000, 1 << 30])
def test_what_is_kept_in_memory_changes_nothing(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY", memory)
    settings = QUICK | {"blocks": "all", "race": 0.0}
    plain, _, _ = evolve(Evolve(**settings))
    student, teacher, data = start()
    whole_network(Evolve(**settings), student, teacher, data)
    assert same(plain.snapshot(), student.snapshot())


def whole_network(stage: Evolve, student: Student, teacher: Captured, data: Images) -> None:
    """The same search written plainly: every child runs through all of the network."""
    run = Run(seed=1, precision="float32")
    batches = Batches(teacher, data.sample(24, seed=1), stage.batch, run, "")
    searched = stage.searched(student, teacher)
    fitness = Fitness(stage.fitness)

    def measure() -> float:
        return float(batches.losses(student.flat, fitness).double().mean())

    current, visits = measure(), 0
    for _ in range(stage.passes):
        for one in searched:
            draws = torch.Generator().manual_seed(1 * 1_000_003 + visits)
            members = [(current, 0, one.scales.get())] * POPULATION
            least = one.scales.least()
            for cycle in range(CYCLES):
                chosen = torch.randint(POPULATION, (TOURNAMENT,), generator=draws)
                child = stage.mutation.child(members[int(chosen.min())][2], least, draws)
                one.scales.set(child)
                members.append((measure(), cycle + 1, child))
                members = sorted(members, key=lambda m: m[:2])[:POPULATION]
            current, _, best = members[0]
            one.scales.set(best)
            visits += 1


@pytest.mark.parametrize("trials", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_racing_finds_the_winner_of_the_full_evaluation(trials: int) -> None:
    different, early = 0, 0
    student, teacher, _ = start("residual")
    data, before = dataset(128), student.snapshot()
    settings = QUICK | {"passes": 1, "batch": 32, "images": 128, "blocks": "all"}
    settings |= {"mutation": Mutation(size=0.1, share=1.0)}
    for seed in range(trials):
        results = []
        for race in (0.0, 1e-3):
            student.restore(before)
            run = Run(seed=seed, precision="float32")
            Evolve(**settings, race=race).run(student, teacher, data, run)
            results.append(student.snapshot())
        early += run.records[-1].told()["left_early"]
        different += not same(*results)
    assert early > trials
    assert different <= trials // 100


def test_only_the_scales_asked_for_change_and_they_stay_positive() -> None:
    student, before, notes = evolve(Evolve(**QUICK, blocks=("attention",)))
    allowed = {f"{layer.weight}.scale" for layer in student.layers if layer.weight and layer.name in attention_layers()}
    touched = changed(before, student.snapshot())
    assert touched
    assert touched <= allowed
    assert all(bool((q.scale > 0).all()) for _, q in parameters(student.graph, "weight"))
    assert notes["scales"] == sum(student.quantizer(k.removesuffix(".scale")).scale.numel() for k in allowed)


def attention_layers() -> set[str]:
    blocks = find_blocks(prepared("transformer").graph)
    return {name for b in blocks if b.kind == "attention" for name in b.layers}


@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_blocks_are_visited_from_the_network_s_end_to_its_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[str] = []
    visit = module._Search._visit

    def noted(self: Any, position: int) -> None:
        visited.append(self.searched[position].block.name)
        visit(self, position)

    monkeypatch.setattr(module._Search, "_visit", noted)
    _, _, notes = evolve(Evolve(**QUICK, blocks="all"), name)
    nodes = [n.name for n in prepared(name).graph.graph.nodes]
    places = {b.name: nodes.index(b.nodes[0]) for b in find_blocks(prepared(name).graph)}
    backwards = [places[block] for block in notes["blocks"]]
    assert len(backwards) > 1
    assert backwards == sorted(backwards, reverse=True)
    assert visited == notes["blocks"] * QUICK["passes"]


def test_keep_moves_values_and_keeps_integers() -> None:
    student, teacher, data = start()
    codes = {s: q.codes(rewrite.get_tensor(student.graph, s)) for s, q in parameters(student.graph, "weight")}
    scales = {s: q.scale for s, q in parameters(student.graph, "weight")}
    Evolve(**QUICK, meaning="keep", blocks="all").run(student, teacher, data, Run(seed=1, precision="float32"))
    for stored, quantizer in parameters(student.graph, "weight"):
        assert torch.equal(quantizer.codes(rewrite.get_tensor(student.graph, stored)), codes[stored])
    assert any(not torch.equal(q.scale, scales[s]) for s, q in parameters(student.graph, "weight"))


def test_round_changes_integers_and_keeps_the_stored_weights() -> None:
    student, teacher, data = start()
    stored = {s: rewrite.get_tensor(student.graph, s) for s, _ in parameters(student.graph, "weight")}
    codes = {s: q.codes(stored[s]) for s, q in parameters(student.graph, "weight")}
    Evolve(**QUICK, blocks="all").run(student, teacher, data, Run(seed=1, precision="float32"))
    assert all(rewrite.get_tensor(student.graph, s) is t for s, t in stored.items())
    assert any(not torch.equal(q.codes(stored[s]), codes[s]) for s, q in parameters(student.graph, "weight"))


@pytest.mark.parametrize("meaning", ["round", "keep"])
def test_without_passes_the_network_is_as_before(meaning: Any) -> None:
    student, before, notes = evolve(Evolve(**QUICK | {"passes": 0}, meaning=meaning))
    assert same(before, student.snapshot())
    assert notes["steps"] == 0
    assert notes["fitness"]["after"] == notes["fitness"]["before"]


def test_the_same_seed_repeats_and_another_does_not() -> None:
    a, b, c = (evolve(Evolve(**QUICK), seed=s)[0].snapshot() for s in (3, 3, 4))
    assert same(a, b)
    assert not same(a, c)


def test_a_budget_of_steps_counts_children_whatever_the_passes() -> None:
    for steps in (0, 4, 17):
        _, _, notes = evolve(Evolve(**QUICK, blocks="all"), steps=steps)
        assert notes["steps"] == steps


def test_a_run_by_minutes_is_repeated_by_its_steps() -> None:
    timed, _, notes = evolve(Evolve(**QUICK, blocks="all"), minutes=1.0 / 60)
    assert notes["steps"] > 0
    counted, _, _ = evolve(Evolve(**QUICK, blocks="all"), steps=notes["steps"])
    assert same(timed.snapshot(), counted.snapshot())


@pytest.mark.parametrize("visits", [1, 3])
@pytest.mark.parametrize("meaning", ["round", "keep"])
def test_an_interrupted_run_goes_on_to_the_same_result(
    visits: int, meaning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    settings = QUICK | {"blocks": "all", "held_out": 0.25}
    stage = Evolve(**settings, meaning=meaning)
    recipe = Recipe(name="test", stages=(CALIBRATE, stage))

    def whole(state: Path | None) -> tuple[Snapshot, dict[str, Any]]:
        teacher = prepared("transformer")
        student = insert_quantizers(teacher, Scheme(weights=3, activations=8))
        run = Run(seed=1, precision="float32")
        run_stages(recipe, student, teacher, dataset(24), run, state=state, identity="test")
        return student.snapshot(), run.records[-1].told()

    expected, notes = whole(None)
    race, calls = Evaluator.race, itertools.count()

    def interrupted(self: Evaluator, *args: Any) -> Tensor | None:
        if next(calls) == visits * CYCLES + 1:  # in the middle of a visit
            raise KeyboardInterrupt
        return race(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "race", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path)
    found, resumed = whole(tmp_path)
    assert same(found, expected)
    for key in ("steps", "fitness", "curve", "better", "left_early"):
        assert resumed[key] == notes[key]


def test_held_out_images_choose_the_pass_and_are_not_searched_on() -> None:
    student, _, notes = evolve(Evolve(**QUICK | {"passes": 4}, held_out=0.33))
    hidden = notes["fitness"]["held_out"]
    assert notes["images"] == 24 - 8
    assert len(hidden) == 5
    _, teacher, data = start()
    taken, _ = module._split(data.sample(24, seed=1), 0.33)
    judge = Batches(teacher, taken, 8, Run(seed=1, precision="float32"), "")
    assert float(judge.losses(student.flat, Fitness()).double().mean()) == pytest.approx(min(hidden), abs=1e-9)


def test_brute_force_on_two_scales_finds_no_better_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of one layer with two output channels: the search reaches the best of a fine grid of both scales."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    teacher = prepare(capture(net, torch.randn(2, 3, 2, 2)))
    student, _, data = start(teacher, bits=2)
    (scales,) = [s.scales for s in Evolve(blocks="all").searched(student, teacher)]
    assert len(scales) == 2
    centre = scales.get() * 1.2
    scales.set(centre)
    batches = Batches(teacher, data, 24, Run(), "")
    fitness = Fitness("mse")

    def measure(candidate: Tensor) -> float:
        scales.set(candidate)
        return float(batches.losses(student.flat, fitness).double().mean())

    def integers() -> Tensor:
        ((stored, quantizer),) = parameters(student.graph, "weight")
        return quantizer.codes(rewrite.get_tensor(student.graph, stored))

    factors = torch.linspace(0.6, 1.2, 61)
    pairs = [torch.stack([a, b]) for a, b in itertools.product(factors, factors)]
    losses = [measure(centre * pair) for pair in pairs]
    lowest, begun = min(losses), measure(centre)
    measure(centre * pairs[losses.index(lowest)])
    best = integers()
    scales.set(centre)
    assert lowest < begun
    assert not torch.equal(best, integers())
    wide = Mutation(size=0.5, share=1.0)
    monkeypatch.setattr(module, "CYCLES", 20)
    stage = Evolve(blocks="all", passes=40, fitness="mse", batch=24, race=0.0, mutation=wide)
    run = Run(seed=0, precision="float32")
    stage.run(student, teacher, data, run)
    assert torch.equal(best, integers())
    assert run.records[-1].told()["fitness"]["after"] <= lowest + 0.02 * (begun - lowest)


def test_random_search_draws_around_the_start() -> None:
    student, before, notes = evolve(Evolve(**QUICK | {"passes": 6}, search="random"))
    after = student.snapshot()
    for key in changed(before, after):
        ratio = after.tensors[key] / before.tensors[key] - 1
        assert float(ratio.abs().max()) <= 0.05 + 1e-5
    curve = [fitness for _, fitness in notes["curve"]]
    assert curve == sorted(curve, reverse=True)


def test_scales_that_do_not_matter_leave_the_network_alone() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 4), nn.Linear(4, 3, bias=False)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x.flatten(1))))

    teacher = prepare(capture(Deaf(), torch.randn(2, 3, 2, 2)))
    student, before, notes = evolve(Evolve(**QUICK, blocks="all", fitness="mse"), teacher)
    assert same(before, student.snapshot())
    assert notes["better"] == 0


def test_attention_in_a_network_without_it_names_the_blocks() -> None:
    with pytest.raises(UsageError, match=r"no block of kind attention.*residual") as caught:
        evolve(Evolve(**QUICK, blocks=("attention",)), "residual")
    assert "\n" not in str(caught.value)


def test_auto_takes_every_block_of_a_network_without_attention() -> None:
    _, _, notes = evolve(Evolve(**QUICK), "residual")
    assert len(notes["blocks"]) > 1
    assert notes["fitness"]["after"] < notes["fitness"]["before"]


def test_one_image_has_no_negatives() -> None:
    teacher = prepared("transformer")
    student, _, _ = start()
    with pytest.raises(UsageError, match="negatives"):
        Evolve(**QUICK).run(student, teacher, dataset(1), Run())
    with pytest.raises(UsageError, match="negatives"):
        Evolve(**QUICK | {"batch": 1}).run(student, teacher, dataset(4), Run())
    Evolve(**QUICK | {"batch": 1}, fitness="kl").run(student, teacher, dataset(4), Run())


@pytest.mark.parametrize(
    ("count", "settings", "match"),
    [(1, {}, "infoNCE"), (4, {"batch": 1}, "infoNCE"), (24, {"blocks": ("token mixer",)}, "Its blocks: .*attention")],
)
def test_what_cannot_be_searched_is_said_before_the_first_stage(
    count: int, settings: dict[str, Any], match: str
) -> None:
    teacher = prepared("transformer")
    student = insert_quantizers(teacher, Scheme(weights=4, activations=8))
    recipe = Recipe(name="late", summary="", stages=(CALIBRATE, Evolve(**QUICK | settings)))
    run = Run()
    with pytest.raises(UsageError, match=match):
        run_stages(recipe, student, teacher, dataset(count), run)
    assert run.history == []


def test_float_weights_leave_nothing_to_evolve() -> None:
    teacher = prepared("transformer")
    student = insert_quantizers(teacher, Scheme(weights=None, activations=8))
    CALIBRATE.run(student, teacher, dataset(4), Run())
    with pytest.raises(BitwrightError, match="nothing to evolve"):
        Evolve(**QUICK).run(student, teacher, dataset(4), Run())


@pytest.mark.parametrize("name", ["upsample", "tuple_output", "mixer", "shifted_window", "relative_position"])
def test_any_output_and_architecture(name: str) -> None:
    _, _, notes = evolve(Evolve(**QUICK, fitness="mse"), name)
    assert notes["fitness"]["after"] <= notes["fitness"]["before"]


@pytest.mark.parametrize("measure", ["infonce", "mse"])
def test_outputs_that_no_image_changes_do_not_count(measure: Any) -> None:
    teacher = prepared("anchors")
    student, before, notes = evolve(Evolve(**QUICK, fitness=measure, blocks="all"), teacher)
    assert notes["fitness"]["after"] <= notes["fitness"]["before"]
    assert changed(before, student.snapshot())


def test_the_teacher_is_not_changed() -> None:
    teacher = prepared("transformer")
    before = {k: v.clone() for k, v in teacher.graph.named_buffers()}
    evolve(Evolve(**QUICK, meaning="keep", blocks="all"))
    assert all(torch.equal(v, before[k]) for k, v in teacher.graph.named_buffers())


@pytest.mark.parametrize("meaning", ["round", "keep"])
def test_frozen_and_saved_it_computes_the_same(meaning: Any, tmp_path: Path) -> None:
    student, _, _ = evolve(Evolve(**QUICK, meaning=meaning, blocks="all"))
    batch = images(4, seed=9)
    with torch.no_grad():
        simulated = student.flat(batch)
        frozen = student.freeze().flat(batch)
        save_packed(student, tmp_path / "model.safetensors")
        loaded = load_packed(tmp_path / "model.safetensors")[0].flat(batch)
    for a, b, c in zip(simulated, frozen, loaded, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_other_precisions_are_noted_and_never_leave_it_worse(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 0.0)
    student, teacher, data = start()
    run = Run(seed=1, precision=precision)
    Evolve(**QUICK, race=0.0).run(student, teacher, data, run)
    notes = run.records[-1].told()
    assert notes["precision"] in ({"float32", "bfloat16"} if precision == "auto" else {precision})
    losses = Batches(teacher, data.sample(24, seed=1), 8, run, "").losses(student.flat, Fitness())
    assert notes["fitness"]["after"] == pytest.approx(float(losses.double().mean()), abs=1e-9)
    assert notes["fitness"]["after"] <= notes["fitness"]["before"]


def test_a_small_network_is_always_searched_in_float32() -> None:
    run = evolve(Evolve(**QUICK), precision="auto")[2]
    assert run["precision"] == "float32"


def test_measuring_precisions_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 0.0)
    settings = QUICK | {"blocks": "all", "meaning": "keep"}
    a, _, _ = evolve(Evolve(**settings), precision="float32", steps=5)
    b, _, notes = evolve(Evolve(**settings), precision="auto", steps=5)
    assert notes["precision"] != "float32" or same(a.snapshot(), b.snapshot())


def test_restored_scales_are_what_they_were() -> None:
    student, _, _ = start()
    before = student.snapshot()
    keys = [str(x.weight) for x in student.layers if x.weight is not None]
    scales = Scales(student, keys, "keep")
    scales.set(scales.get() * 1.1)
    assert not same(before, student.snapshot())
    scales.restore()
    assert same(before, student.snapshot())


def test_recipes_share_a_budget_of_minutes() -> None:
    run = Run(minutes=10.0)
    stages = builtin_recipes()["eptq+evolq"].stages
    first = run.of(stages, len(stages) - 2)
    last = run.of(stages, len(stages) - 1)
    assert isinstance(stages[-2], Reconstruct)
    assert first.minutes == pytest.approx(10 / 1.3, rel=1e-3)
    assert last.minutes == pytest.approx(10.0, rel=1e-3)
    assert run.of(stages, 0).minutes == 10.0
    each = Run(steps_each=(7,))
    assert (each.of(stages, len(stages) - 2).steps, each.of(stages, len(stages) - 1).steps) == (7, None)


def test_scales_of_dead_biases_have_a_floor() -> None:
    student, _, _ = start(bits=8)
    layer = next(x for x in student.layers if x.bias is not None and x.weight is not None)
    scales = Scales(student, [str(layer.weight)], "round")
    scales.set(torch.full_like(scales.get(), 1e-30))
    least = Scales(student, [str(layer.weight)], "round").least()
    assert float(least.max()) <= 1e-30 * 1.001


def test_a_child_that_is_not_better_on_the_first_images_leaves_after_them() -> None:
    student, teacher, data = start()
    settings = QUICK | {"passes": 2, "batch": 4, "look": 0.1}  # six batches, of which one is looked at
    run = Run(seed=1, precision="float32")
    measured: list[int] = []
    measure = Fitness.__call__

    def noted(self: Fitness, *given: Any) -> Tensor:
        measured.append(1)
        return measure(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitness, "__call__", noted)
        Evolve(**settings).run(student, teacher, data, run)
    notes = run.records[-1].told()
    assert 0 < notes["left_early"] < notes["steps"]
    before = 2 * 6  # the float network's own, and the start's
    assert len(measured) == before + notes["left_early"] + 6 * (notes["steps"] - notes["left_early"])
    assert notes["fitness"]["after"] <= notes["fitness"]["before"]


@pytest.mark.parametrize("settings", [{"race": 0.0, "batch": 4}, {"look": 0.0, "batch": 4}, {"batch": 8}])
def test_nobody_leaves_at_first_sight_without_a_look(settings: dict[str, Any]) -> None:
    _, _, notes = evolve(Evolve(**QUICK | {"look": 0.1} | settings))
    assert notes["left_early"] == 0
