"""The command line: one typed function a verb. What a verb does stands in `bitwright.commands`.

Nothing here may import torch or pydantic at the top: ``bitwright --help`` answers in under half a second.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.errors import BitwrightError, UsageError, debugging, of_the_machine
from bitwright.terminal import Terminal, one_line, print_error

app = typer.Typer(
    name="bitwright",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# ----------------------------------------------------------------------------------------------- arguments

_BITS, _IMAGES = "What is quantized, and how", "How image files become the network's input"
_BUDGET = "How long the optimisation may take"
_MIXED = "Bits layer by layer, planned within limits"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="zoo:NAME, timm:NAME@weights, torchvision:NAME@weights, path/to/file.py:callable or model.pt2",
        show_default=False,
    ),
]
ImagesArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="A folder, an .npz file or zoo:NAME, with an optional slice as in 'photos[0::2]'",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="A name out of `bitwright recipes`, or a .yaml or .py file  [default: the best there is]",
        rich_help_panel=_BITS,
    ),
]
WeightsOption = Annotated[str, typer.Option(help="Bits of weights: 2 to 8, or float", rich_help_panel=_BITS)]
ActivationsOption = Annotated[
    str,
    typer.Option(
        help="Bits of activations: 2 to 8, 16, float, or auto (8, and 16 for the few that need them)",
        rich_help_panel=_BITS,
    ),
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Exception for layers, as in 'head=w8a8' or 'blocks.*=w3'; the last that matches decides",
        rich_help_panel=_BITS,
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        help="A plan.json, or a run with one: bits layer by layer; --weights and --activations for what it leaves open",
        rich_help_panel=_BITS,
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        help="Where the result will run: onnxruntime, openvino, generic or generic-pot", rich_help_panel=_BITS
    ),
]
GranularityOption = Annotated[
    str,
    typer.Option(
        help="What shares a weight scale: channel, tensor, group, or head (of attention; all other weights by channel)",
        rich_help_panel=_BITS,
    ),
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Input channels of one scale with --granularity group  [default: 64], most channels of a head with head  "
        "[default: all]",
        show_default=False,
        rich_help_panel=_BITS,
    ),
]
TargetSizeOption = Annotated[
    str | None,
    typer.Option(help="Size that model.safetensors may have: 3500000B, 100kB, 3.5MB or 3MiB", rich_help_panel=_MIXED),
]
CompressionOption = Annotated[
    str | None,
    typer.Option(
        help="How many times smaller than the float parameters model.safetensors must be, as in 6",
        rich_help_panel=_MIXED,
    ),
]
MaxBopsOption = Annotated[
    str | None,
    typer.Option(help="Multiply-accumulates x bits of both operands, as in 2e9 or 2G", rich_help_panel=_MIXED),
]
MaxLatencyOption = Annotated[
    str | None, typer.Option(help="Milliseconds for one image", metavar="MS", rich_help_panel=_MIXED)
]
MeasureOption = Annotated[
    str,
    typer.Option(
        help="What predicts losses: loss, trace, distance, quadratic, eigenvalue or q-bert", rich_help_panel=_MIXED
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder where measured losses are kept  [default: BITWRIGHT_CACHE, or ~/.cache/bitwright]",
        show_default=False,
        rich_help_panel=_MIXED,
    ),
]
LabelsOption = Annotated[
    str | None, typer.Option(help="CSV of file,class_index; class folders and .npz files bring their own")
]
OutputOption = Annotated[str | None, typer.Option(help="Name of the output to keep, if the model returns several")]
InputSizeOption = Annotated[
    str | None, typer.Option(help="224, 224x320 (height x width) or 1x28x28", rich_help_panel=_IMAGES)
]
MeanOption = Annotated[
    str | None, typer.Option(help="One number, or one per channel, for pixel values in 0..1", rich_help_panel=_IMAGES)
]
StdOption = Annotated[str | None, typer.Option(help="One number, or one per channel, above 0", rich_help_panel=_IMAGES)]
InterpolationOption = Annotated[
    str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos", rich_help_panel=_IMAGES)
]
CropOption = Annotated[
    float | None,
    typer.Option("--crop-pct", help="Input size over resized size, such as 0.875", rich_help_panel=_IMAGES),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        help="Steps of the optimisation, instead of the recipe's; 300,500 for a recipe with two such stages",
        metavar="N[,N]",
        rich_help_panel=_BUDGET,
    ),
]
MinutesOption = Annotated[
    float | None,
    typer.Option(
        help="Minutes for the whole optimisation, instead of --steps; the result says how many steps that made",
        rich_help_panel=_BUDGET,
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="Number format of the optimisation: float32, bfloat16, or auto, whichever is faster here",
        rich_help_panel=_BUDGET,
    ),
]
SkipOption = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded")]
SeedOption = Annotated[int, typer.Option(help="Seed of all random choices")]
NoImagesOption = Annotated[
    bool, typer.Option("--no-images", help="Leave out of the report the few images whose answers differ")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr")]


def _settings(**given: Any) -> dict[str, Any]:
    """What was said of preprocessing."""
    return {name: value for name, value in given.items() if value is not None}


def _precision(name: str) -> Any:
    if name not in {"auto", "float32", "bfloat16"}:
        raise UsageError(f"Expected --precision auto, float32 or bfloat16, found '{name}'.")
    return name


def _scheme(
    weights: str, activations: str, rule: list[str] | None, runtime: str, granularity: str, group_size: int | None
) -> Any:
    """The scheme, checked before PyTorch is loaded."""
    from bitwright.quant.scheme import GRANULARITIES, Rule, Scheme

    if granularity not in GRANULARITIES:
        raise UsageError(f"Expected a granularity out of {', '.join(GRANULARITIES)}, found '{granularity}'.")
    if group_size is not None and group_size < 1:
        raise UsageError(f"Expected a group of at least 1 channel, found {group_size}.")
    scheme = Scheme.model_validate(
        {
            "weights": weights,
            "activations": activations,
            "rules": tuple(Rule.parse(text) for text in rule or ()),
            "runtime": runtime,
            "granularity": granularity,
            "group_size": group_size,
        }
    )
    _ = scheme.target
    return scheme


def _plan(path: Path | None, scheme: Any) -> tuple[Any, Any]:
    """The plan, read before PyTorch is loaded, and the scheme with it."""
    from bitwright.bits.plan import Plan

    plan = None if path is None else Plan.read(path)
    return plan, scheme if plan is None else plan.scheme(scheme)


def _goal(weights: str | None, activations: str, measure: str, plan: Path | None, limits: dict[str, str | None]) -> Any:
    """What is wanted of a plan that is still to be made; None if nothing is limited."""
    from bitwright.bits.goal import Goal, flag

    given = [name for name, value in limits.items() if value is not None]
    if not given:
        several = "--weights" if "," in (weights or "") else "--activations" if "," in activations else None
        if several:
            raise UsageError(f"Several bits ({several}) are for a plan: give a limit too, such as --compression 8.")
        return None
    if plan is not None:
        raise UsageError(f"Expected --plan or {flag(given[0])}, found both.")
    return Goal.parse(
        weights="auto" if weights is None else weights, activations=activations, measure=measure, **limits
    )


# --------------------------------------------------------------------------------------------------- verbs


def _version(wanted: bool) -> None:
    if wanted:
        import bitwright

        typer.echo(f"bitwright {bitwright.__version__}")
        raise typer.Exit


@app.callback()
def _bitwright(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Turns a trained vision network and a few unlabelled images into the best low-bit network they can give.

    Start with `bitwright demo`; then `bitwright quantize MODEL IMAGES`. Every verb explains itself with `--help`.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two runs")] = Path("demo"),
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the runs of an earlier demo")] = False,
    as_json: JsonOption = False,
) -> None:
    """The whole job on two networks and images that ship with bitwright: a few minutes, nothing to download.

    Quantizes a small CNN and a small vision transformer to 4-bit weights and 8-bit activations from unlabelled
    images, scores them on 10,000 test images, writes ONNX files and checks those in ONNX Runtime.

    Example: `bitwright demo --out demo --force`
    """
    with Terminal(as_json=as_json) as terminal:
        terminal.begin("Loading PyTorch")
        from bitwright.commands import demo as command

        results = command.demo(out, recipe=recipe, force=force, seed=seed, terminal=terminal)
        terminal.result({"out": str(out), "runs": results})
        command.show(results, out, terminal)


@app.command()
def quantize(
    model: ModelArgument,
    images: ImagesArgument,
    recipe: RecipeOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Bits of weights: 2 to 8, or float; with a limit those to choose among  [default: 8; with a limit "
            "2,3,4,5,6,8]",
            show_default=False,
            rich_help_panel=_BITS,
        ),
    ] = None,
    activations: ActivationsOption = "8",
    rule: RuleOption = None,
    plan: PlanOption = None,
    target_size: TargetSizeOption = None,
    compression: CompressionOption = None,
    max_bops: MaxBopsOption = None,
    max_latency: MaxLatencyOption = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            help="Share of answers that may change, as in 0.01: the smallest network that keeps it, as estimated",
            rich_help_panel=_MIXED,
        ),
    ] = None,
    measure: MeasureOption = "loss",
    cache: CacheOption = None,
    samples: Annotated[
        int | None, typer.Option(help="Images to calibrate on, evenly spread  [default: 512 at most]")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Images to measure on; the calibration images if not given")
    ] = None,
    labels: LabelsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write  [default: runs/MODEL-RECIPE-w8a8]", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    runtime: RuntimeOption = "onnxruntime",
    granularity: GranularityOption = "channel",
    group_size: GroupSizeOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    steps: StepsOption = None,
    minutes: MinutesOption = None,
    precision: PrecisionOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in --out")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a run in --out, finished or not; keep an ONNX file that fails its check"),
    ] = False,
    no_images: NoImagesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be quantized; calibrate and write nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantizes a network with unlabelled images and writes a run folder: packed integers, ONNX, measurements.

    Labels are never used for quantizing; with `--evaluate` (and `--labels`, where the images do not carry them) they
    say how accurate the result is. The ONNX file is checked in ONNX Runtime on real images before it is kept.

    With a limit (`--target-size`, `--compression`, `--max-bops`, `--max-latency`, `--max-drop`) bits are planned layer
    by layer; `bitwright plan` shows the choice there is.

    Example: `bitwright quantize zoo:fashion_cnn zoo:fashion --weights 4`
    """
    with Terminal(as_json=as_json) as terminal:
        limits = {
            "target_size": target_size,
            "compression": compression,
            "max_bops": max_bops,
            "max_latency": max_latency,
            "max_drop": max_drop,
        }
        goal = _goal(weights, activations, measure, plan, limits)
        bits = (
            ("8", "8") if goal else ("8" if weights is None else weights, "8" if activations == "auto" else activations)
        )
        scheme = _scheme(*bits, rule, runtime, granularity, group_size)
        planned, scheme = _plan(plan, scheme)
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import quantize as command

        job = command.Job(
            model,
            images,
            scheme,
            recipe,
            raise_few=activations == "auto",
            plan=planned,
            plan_file=plan,
            goal=goal,
            cache=cache,
            samples=samples,
            steps=command.parse_steps(steps),
            minutes=minutes,
            precision=_precision(precision),
            evaluate=evaluate,
            labels=labels,
            out=out,
            seed=seed,
            device=device,
            output=output,
            settings=settings,
            skip_unreadable=skip_unreadable,
            resume=resume,
            force=force,
            pictures=not no_images,
        )
        if dry_run:
            command.dry_run(job, terminal)
            return
        result, folder, failure = command.quantize(job, terminal)
        terminal.result({**result, "run": str(folder)})
        command.show(result, folder, terminal)
    if failure is not None:
        raise failure


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, an ONNX file, or a float network as for quantize")
    ],
    images: ImagesArgument,
    labels: LabelsOption = None,
    float_model: Annotated[
        str | None,
        typer.Option(
            "--float", help="The float network to compare with; a run knows its own, unless it is Python code"
        ),
    ] = None,
    output: OutputOption = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AXIS",
            help="Axis of an output that holds its classes, or none, where that is not told right; repeatable",
        ),
    ] = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy with its 95 % interval where there are labels; agreement, KL and noise against the float network.

    An ONNX file is run by ONNX Runtime on the CPU.

    Example: `bitwright evaluate zoo:fashion_cnn 'zoo:fashion-test[:1000]'`
    """
    with Terminal(as_json=as_json) as terminal:
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import evaluate as command

        found = command.evaluate(
            model,
            images,
            labels=labels,
            float_model=float_model,
            output=output,
            skip_unreadable=skip_unreadable,
            settings=settings,
            terminal=terminal,
            classes=classes,
        )
        found["warnings"] = terminal.warnings
        terminal.result(found)
        terminal.show(*command.views(found))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, or a float network as for quantize")],
    weights: WeightsOption = "8",
    activations: ActivationsOption = "8",
    rule: RuleOption = None,
    plan: PlanOption = None,
    runtime: RuntimeOption = "onnxruntime",
    granularity: GranularityOption = "channel",
    group_size: GroupSizeOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Show the blocks: attention, MLPs, residual branches, chains")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows every tensor that is quantized, every one that is not and why; parameters, MACs and sizes.

    For a float network: what would be quantized with these bits and rules, or with `--plan`. For a run: what was.

    Example: `bitwright inspect zoo:fashion_vit --weights 4`
    """
    with Terminal(as_json=as_json) as terminal:
        scheme = _scheme(weights, activations, rule, runtime, granularity, group_size)
        planned, _ = _plan(plan, scheme)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import inspect as command

        settings = _settings(input_size=input_size)
        facts, views = command.inspect(
            model, scheme=scheme, plan=planned, output=output, settings=settings, blocks=blocks, terminal=terminal
        )
        terminal.result(facts)
        terminal.show(*views)


@app.command()
def sensitivity(
    model: ModelArgument,
    images: ImagesArgument,
    bits: Annotated[int, typer.Option(help="Bits of weights at which layers are ranked: 2 to 8")] = 4,
    matrix: Annotated[
        str | None,
        typer.Option(
            help="fisher and squared need no label; hessian is that of cross-entropy  [default: hessian with --labels, "
            "fisher without]",
            show_default=False,
        ),
    ] = None,
    labels: LabelsOption = None,
    samples: Annotated[
        int | None, typer.Option(help="How many of the images to use  [default: 64 at most]", show_default=False)
    ] = None,
    eigenvalues: Annotated[
        int, typer.Option(help="Eigenvalues per layer, per block and of the network; 0 saves most of the time")
    ] = 1,
    steps: Annotated[int, typer.Option(help="Passes over the images for eigenvalues and densities, at most")] = 20,
    spectrum_samples: Annotated[int, typer.Option(help="Images to use for eigenvalues and densities, at most")] = 32,
    probes: Annotated[int, typer.Option(help="Random vectors for traces in each batch, at most")] = 32,
    tolerance: Annotated[float, typer.Option(help="Relative standard error of traces that is good enough")] = 0.05,
    channels: Annotated[
        float | None,
        typer.Option(help="Which output channels HAP would prune, for this share of all; 0 to 1", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the two files  [default: sensitivity]", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files that an earlier call left in --out")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The curvature of a network's weights without labels: traces, eigenvalues, spectrum; which layers need bits.

    Writes sensitivity.json (everything measured, layer by layer, block by block) and sensitivity.html (a plot,
    offline). With labels, the Hessian of cross-entropy instead.

    Example: `bitwright sensitivity zoo:fashion_cnn zoo:fashion --samples 32`
    """
    with Terminal(as_json=as_json) as terminal:
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import sensitivity as command
        from bitwright.sensitivity import report

        chosen: Any = matrix or ("fisher" if labels is None else "hessian")
        job = command.Job(
            model,
            images,
            labels,
            report.Settings(chosen, bits, eigenvalues, steps, spectrum_samples, probes, tolerance, channels),
            samples=samples,
            out=out,
            seed=seed,
            device=device,
            output=output,
            preprocessing=settings,
            skip_unreadable=skip_unreadable,
            force=force,
        )
        found, paths = command.sensitivity(job, terminal)
        terminal.result({**found, "files": [str(p) for p in paths]})
        command.show(found, paths, terminal)


@app.command()
def plan(
    model: ModelArgument,
    images: ImagesArgument,
    target_size: TargetSizeOption = None,
    compression: CompressionOption = None,
    max_bops: MaxBopsOption = None,
    max_latency: MaxLatencyOption = None,
    max_activation_size: Annotated[
        str | None,
        typer.Option(
            help="Memory that the activations of one image may take together, as in 64kB", rich_help_panel=_MIXED
        ),
    ] = None,
    max_total_size: Annotated[
        str | None,
        typer.Option(
            help="Size of model.safetensors and of the activations together, as in 3MB", rich_help_panel=_MIXED
        ),
    ] = None,
    point: Annotated[
        int | None,
        typer.Option(help="This point of the curve instead of a limit; the table and pareto.json number them"),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Bits of weights to choose among", rich_help_panel=_BITS)
    ] = "2,3,4,5,6,8",
    activations: Annotated[
        str, typer.Option(help="Bits of activations to choose among, as in 4,8,16; or float", rich_help_panel=_BITS)
    ] = "8",
    rule: RuleOption = None,
    recipe: RecipeOption = None,
    measure: MeasureOption = "loss",
    by: Annotated[
        str | None,
        typer.Option(
            help="What the curve runs along: size, activations, total, bops or latency  [default: what is limited]",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(help="Points of the curve")] = 33,
    samples: Annotated[
        int | None, typer.Option(help="Images to measure losses on  [default: 16 to 256]", show_default=False)
    ] = None,
    cache: CacheOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the three files  [default: plan]", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    runtime: RuntimeOption = "onnxruntime",
    granularity: GranularityOption = "channel",
    group_size: GroupSizeOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files that an earlier call left in --out")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bits for every layer within limits, and the curve of what other limits would give.

    Measures what each choice of bits costs each layer, finds the plan that loses least, and writes plan.json (edit it,
    give it to `quantize --plan`), pareto.json (every point of the curve) and plan.html (a plot, offline). Without a
    limit the plan is as large as 4 bits everywhere. Losses are kept, so that the next plan takes seconds.

    Example: `bitwright plan zoo:fashion_cnn zoo:fashion --target-size 100kB --out plan-100kB`
    """
    with Terminal(as_json=as_json) as terminal:
        from bitwright.bits.goal import Goal

        goal = Goal.parse(
            target_size=target_size,
            compression=compression,
            max_bops=max_bops,
            max_latency=max_latency,
            max_activation_size=max_activation_size,
            max_total_size=max_total_size,
            weights=weights,
            activations=activations,
            measure=measure,
        )
        scheme = _scheme("8", "8", rule, runtime, granularity, group_size)
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import plan as command

        job = command.Job(
            model,
            images,
            scheme,
            goal,
            recipe=recipe,
            point=point,
            by=by,
            points=points,
            samples=samples,
            cache=cache,
            out=out,
            seed=seed,
            device=device,
            output=output,
            preprocessing=settings,
            skip_unreadable=skip_unreadable,
            force=force,
        )
        found, facts, paths = command.plan(job, terminal)
        terminal.result({**facts, "files": [str(p) for p in paths]})
        command.show(found, facts, paths, terminal)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder")],
    to: Annotated[str, typer.Option(help="onnx, openvino or pt2")] = "onnx",
    images: Annotated[
        str | None, typer.Option(help="Images for the check  [default: those of the run, if they are still there]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images to check on")] = 128,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write  [default: model.onnx, .xml or .pt2 in the run]", show_default=False),
    ] = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    force: Annotated[bool, typer.Option("--force", help="Keep a file that fails the check")] = False,
    as_json: JsonOption = False,
) -> None:
    """Writes a run for another runtime and checks it there on real images, layer by layer and as a whole.

    A file that computes something else than what was measured is refused, naming the first layer that diverges.

    Example, after `bitwright demo`: `bitwright export demo/fashion_cnn`
    """
    with Terminal(as_json=as_json) as terminal:
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import export as command

        found = command.export(
            run,
            to=to,
            images=images,
            out=out,
            force=force,
            skip_unreadable=skip_unreadable,
            settings=settings,
            samples=samples,
            terminal=terminal,
        )
        found["warnings"] = terminal.warnings
        terminal.result(found)
        terminal.show(command.table(found))


@app.command()
def compare(
    model: ModelArgument,
    images: ImagesArgument,
    recipes: Annotated[str, typer.Option(help="Names or files of recipes, as in rtn,mse,eptq", show_default=False)],
    weights: WeightsOption = "8",
    activations: ActivationsOption = "8",
    rule: RuleOption = None,
    plan: PlanOption = None,
    samples: Annotated[
        int | None, typer.Option(help="Images to calibrate on, evenly spread  [default: 512 at most]")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Images to measure on; the calibration images if not given")
    ] = None,
    labels: LabelsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run folders and the page  [default: comparison]", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    runtime: RuntimeOption = "onnxruntime",
    granularity: GranularityOption = "channel",
    group_size: GroupSizeOption = None,
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the optimisation, in each recipe that has one", rich_help_panel=_BUDGET),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes for each recipe, instead of --steps", rich_help_panel=_BUDGET)
    ] = None,
    precision: PrecisionOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs in --out that are finished, and go on with the others")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the runs in --out")] = False,
    no_images: NoImagesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compares recipes on the same network, images, bits, seed and budget: a run folder each, a table, a page.

    A recipe that fails is shown as failed and does not stop the others; the exit code is then 1.

    Example: `bitwright compare zoo:fashion_cnn zoo:fashion --recipes rtn,mse --weights 4`
    """
    with Terminal(as_json=as_json) as terminal:
        scheme = _scheme(weights, activations, rule, runtime, granularity, group_size)
        planned, scheme = _plan(plan, scheme)
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import compare as command
        from bitwright.commands import quantize as single

        job = single.Job(
            model,
            images,
            scheme,
            plan=planned,
            plan_file=plan,
            samples=samples,
            steps=None if steps is None else (steps,),
            minutes=minutes,
            precision=_precision(precision),
            evaluate=evaluate,
            labels=labels,
            seed=seed,
            device=device,
            output=output,
            settings=settings,
            skip_unreadable=skip_unreadable,
            resume=resume,
            force=force,
            pictures=not no_images,
        )
        chosen = command.parse_recipes(recipes)
        comparing = command.Comparison(job, chosen, (out or Path("comparison")).expanduser().absolute())
        found, page, failure = command.compare(comparing, terminal)
        terminal.result({**found, "page": str(page)})
        command.show(found, page, terminal)
    if failure is not None:
        raise failure


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run folder; several are compared", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write  [default: report.html in the run; comparison.html for several]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Writes report.html of a run again, or a page that compares several runs: accuracy against size.

    Takes what the run left (result.json, report.json, bench.json and parity.json if there are); needs no model and no
    images. The page is one file and opens offline.

    Example, after `bitwright demo`: `bitwright report demo/fashion_cnn`
    """
    with Terminal(as_json=as_json) as terminal:
        terminal.begin("Loading")
        from bitwright.commands import report as command

        found, path = command.report(runs, out, terminal)
        terminal.result({**found, "page": str(path)})
        command.show(found, path, terminal)


@app.command()
def bench(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder with a model.onnx in it")],
    batch: Annotated[
        str, typer.Option(help="Images in one call of the file; several sizes are measured one by one")
    ] = "1,32",
    threads: Annotated[
        str | None,
        typer.Option(
            help="Threads of the runtime; several are measured one by one  [default: 1 and all there are]",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds for all timings together, without warming up")] = 20.0,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime or openvino; may be repeated  [default: what is installed]", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Times a run's ONNX file and the float network in turn: latency, throughput, memory; writes bench.json.

    Medians and quartiles of each, and of the ratio, round by round, so that a machine that speeds up or slows down
    does so for both. Close other programs first.

    Example, after `bitwright demo`: `bitwright bench demo/fashion_cnn --seconds 5`
    """
    with Terminal(as_json=as_json) as terminal:
        from bitwright.commands import bench as command

        found = command.bench(
            run,
            runtimes=runtime,
            batches=command.counts(batch, "--batch"),
            threads=command.counts(threads, "--threads"),
            seconds=seconds,
            terminal=terminal,
        )
        terminal.result(found)
        terminal.show(*command.views(found))


@app.command()
def parity(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder with a model.onnx in it")],
    images: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGES",
            help="Images, as for quantize  [default: those of the run, if they are still there]",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime or openvino; may be repeated  [default: what is installed]", show_default=False),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Images in one call of the file; several sizes are measured one by one")
    ] = "1,8",
    samples: Annotated[int, typer.Option(help="Images to compare on, evenly spread, at most")] = 32,
    float_model: Annotated[
        str | None,
        typer.Option(
            "--float", help="The float network; a run knows its own, unless it is Python code", show_default=False
        ),
    ] = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """What quantization cost and what the runtime adds, as two figures; which operator errs, in how many codes.

    Compares the float network, the simulation that was measured, an exact integer reference and the file in its
    runtimes. Writes parity.json into the run folder. Ends with exit code 1 if the file computes something else.

    Example, after `bitwright demo`: `bitwright parity demo/fashion_cnn`
    """
    with Terminal(as_json=as_json) as terminal:
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import parity as command
        from bitwright.commands.bench import counts

        found, failure = command.parity(
            run,
            images,
            runtimes=runtime,
            batches=counts(batch, "--batch") or (),
            samples=samples,
            float_model=float_model,
            skip_unreadable=skip_unreadable,
            settings=settings,
            terminal=terminal,
        )
        terminal.result({**found, "warnings": terminal.warnings})
        terminal.show(*command.views(found))
    if failure is not None:
        raise failure


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Lists the recipes, or prints one as YAML that `--recipe` reads back: copy it, change it, use it.

    Example: `bitwright recipes mse`
    """
    with Terminal(as_json=as_json) as terminal:
        from bitwright.commands import recipes as command

        if name is None:
            terminal.result({"recipes": command.listed()})
            terminal.show(command.table())
        else:
            settings, text = command.printed(name)
            terminal.result(settings)
            terminal.show(text)


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The study to run; without it the studies are listed", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A network, as for quantize  [default: the two embedded networks]"),
    ] = None,
    images: Annotated[
        str | None, typer.Argument(metavar="IMAGES", help="Images to calibrate on, as for quantize", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bits of weights: 2 to 8, or several, as in 3,4", rich_help_panel=_BITS)
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Bits of activations: 2 to 8, 16, or float", rich_help_panel=_BITS)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of each optimisation; in iterations the most, in landscape half a side", rich_help_panel=_BUDGET
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds to repeat everything with, as in 0,1,2; spreads are over these")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Images to calibrate on; the most, in calibration-size")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="In mixed-precision: the recipe that quantizes  [default: eptq]", show_default=False),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Images to measure on; every fourth of IMAGES if not given")
    ] = None,
    labels: LabelsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for NAME.json and NAME.html  [default: studies]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    output: OutputOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropOption = None,
    skip_unreadable: SkipOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted study in --out")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier study in --out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Repeats a paper's analysis and writes NAME.json (everything measured) and NAME.html (a plot, offline).

    Without MODEL and IMAGES it runs on the networks and images that ship with bitwright, in a few minutes:

    - **lfh**: label-free Hessian traces against true ones, layer by layer, for several losses and networks

    - **weighting**: layers and samples weighted equally, by LFH, by SLA, or by both

    - **iterations**: the result against the number of optimisation steps

    - **calibration-size**: the result against the number of calibration images

    - **gradual**: activations on their grids from the first step, or little by little

    - **hmse**: weight ranges before any optimisation

    - **landscape**: how rough losses are over the weight scales of a block

    - **search**: weight scales by evolution, random search and gradient descent, at equal cost

    - **fitness**: the loss that evolution minimises: infoNCE, squared error, cosine, KL

    - **mixed-precision**: the same bits for all layers against plans of bits, over the size of the file

    Example: `bitwright study weighting --steps 50 --seeds 0`
    """
    with Terminal(as_json=as_json) as terminal:
        settings = _settings(input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        terminal.begin("Loading PyTorch")
        from bitwright.commands import study as command

        if name is None:
            terminal.result({"studies": command.listed()})
            terminal.show(command.table())
            return
        job = command.Job(
            name,
            model,
            images,
            steps=steps,
            weights=weights,
            activations=activations,
            seeds=seeds,
            samples=samples,
            recipe=recipe,
            evaluate=evaluate,
            labels=labels,
            out=out,
            device=device,
            output=output,
            settings=settings,
            skip_unreadable=skip_unreadable,
            resume=resume,
            force=force,
        )
        result, paths = command.study(job, terminal)
        terminal.result({**result.to_dict(), "files": [str(p) for p in paths]})
        command.show(result, paths, terminal)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Versions and devices; what is missing or does not fit together, and the line that installs it.

    Example: `bitwright doctor`
    """
    with Terminal(as_json=as_json) as terminal:
        from bitwright.doctor import examine, views

        terminal.begin("Looking around")
        found = examine()
        terminal.result(found)
        terminal.show(*views(found))
    if not found["ok"]:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point.

    Returns:
        0 done, 1 the job failed, 2 the call was wrong, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that sleep while they wait; spinning ones make everything many times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any("\0" in each for each in given):
        print_error("Expected arguments without zero bytes, found one that holds some.")
        return UsageError.exit_code
    try:
        status = app(args=given or ["--help"], prog_name="bitwright", standalone_mode=False)
    except BitwrightError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        status = 130
    except SystemExit as left:  # a pipe that was closed, or a Python file of the user's
        if isinstance(left.__context__, OSError) and left.__context__.errno == errno.EPIPE:
            return 1
        print_error(f"A Python file ended the command (sys.exit({left.code!r})). Take that out of it.")
        return UsageError.exit_code
    except Exception as error:
        return _other(error, given)
    return status if isinstance(status, int) else 0


def _other(error: Exception, given: list[str]) -> int:
    """A wrong call, as typer sees it, or something that nobody expected."""
    if type(error).__name__ == "Abort":
        return 130
    describe, code = getattr(error, "format_message", None), getattr(error, "exit_code", 1)
    if callable(describe):  # every usage error of typer and click
        verb = next((a for a in given if not a.startswith("-")), "")
        known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
        advice = f"bitwright {verb} --help" if verb in known else "bitwright --help"
        print_error(f"{one_line(str(describe())).rstrip('.')}. See {advice}.")
        return int(code)
    if isinstance(error, OSError | MemoryError) and not debugging():
        failure = of_the_machine(error)
        print_error(failure)
        return failure.exit_code
    hint = "" if debugging() else " BITWRIGHT_DEBUG=1 shows where."
    if debugging():
        import traceback

        traceback.print_exception(error)
    print_error(f"unexpected {type(error).__name__}: {one_line(str(error))[:300]}.{hint}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
