"""The verbs of the command line: what each may be given, as a record whose docstring is the verb's help.

Nothing here imports PyTorch or pydantic before a value is asked for.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bitwright.cli import options as opt
from bitwright.cli.signature import Call, argument, option
from bitwright.errors import UsageError

if TYPE_CHECKING:
    from bitwright.bits.goal import Goal
    from bitwright.quant.scheme import Scheme


@dataclass(frozen=True)
class DemoCall(Call):
    """The whole job on two networks and images that ship with bitwright: a few minutes, nothing to download.

    Quantizes a small CNN and a small vision transformer to 4-bit weights and 8-bit activations from unlabelled
    images, scores them on 10,000 test images, writes ONNX files and checks those in ONNX Runtime.

    Example: `bitwright demo --out demo --force`
    """

    out: Path = option("Folder for the two runs", Path("demo"))
    recipe: str | None = opt.recipe_option()
    seed: int = opt.seed_option()
    force: bool = option("Replace the runs of an earlier demo", False)


@dataclass(frozen=True)
class QuantizeCall(Call):
    """Quantizes a network with unlabelled images and writes a run folder: packed integers, ONNX, measurements.

    Labels are never used for quantizing; with `--evaluate` (and `--labels`, where the images do not carry them) they
    say how accurate the result is. The ONNX file is checked in ONNX Runtime on real images before it is kept.

    With a limit (`--target-size`, `--compression`, `--max-bops`, `--max-latency`, `--max-drop`) bits are planned layer
    by layer; `bitwright plan` shows the choice there is.

    Example: `bitwright quantize zoo:fashion_cnn zoo:fashion --weights 4`
    """

    network: opt.NetworkOptions
    recipe: str | None = opt.recipe_option()
    weights: str | None = opt.bits_option(
        "Bits of weights: 2 to 8, or float; with a limit those to choose among  [default: 8; with a limit 2,3,4,5,6,8]"
    )
    bits: opt.BitOptions = opt.BitOptions()
    limits: opt.RunLimitOptions = opt.RunLimitOptions()
    measure: str = opt.measure_option()
    cache: Path | None = opt.cache_option()
    data: opt.DataOptions = opt.DataOptions()
    out: Path | None = option("Folder to write  [default: runs/MODEL-RECIPE-w8a8]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    budget: opt.BudgetOptions = opt.BudgetOptions()
    resume: bool = option("Go on with an unfinished run in --out", False)
    force: bool = option("Replace a run in --out, finished or not; keep an ONNX file that fails its check", False)
    no_images: bool = opt.no_images_option()
    dry_run: bool = option("Show what would be quantized; calibrate and write nothing", False)

    def check(self) -> None:
        """Reads limits, bits, the plan and the budget."""
        _ = self.goal, self.scheme, self.budget.number_format, self.budget.numbers

    @cached_property
    def goal(self) -> Goal | None:
        """Limits within which a plan is made first, if there are any."""
        if self.limits.given:
            if self.bits.plan is not None:
                raise UsageError(f"Expected --plan or --{self.limits.given[0].replace('_', '-')}, found both.")
            weights = "auto" if self.weights is None else self.weights
            return self.limits.goal(weights, self.bits.activations, self.measure)
        for name, value in (("--weights", self.weights), ("--activations", self.bits.activations)):
            if "," in (value or ""):
                raise UsageError(f"Several bits ({name}) are for a plan: give a limit too, such as --compression 8.")
        return None

    @cached_property
    def scheme(self) -> Scheme:
        """The bits of all layers, with the plan in them, if it is made."""
        if self.goal is not None:
            return self.bits.scheme("8", "8")
        return self.bits.scheme("8" if self.weights is None else self.weights, "8" if self.raise_few else None)

    @property
    def folder_name(self) -> str:
        """The folder of a run that was not given one."""
        from bitwright.recipes import DEFAULT
        from bitwright.run.folder import folder_name

        return folder_name(self.network.model, self.recipe or DEFAULT, (self.goal or self.scheme).described_bits())

    @property
    def raise_few(self) -> bool:
        """Whether the few activations that need 16 bits get them."""
        return self.bits.activations == "auto"


@dataclass(frozen=True)
class EvaluateCall(Call):
    """Accuracy with its 95 % interval where there are labels; agreement, KL and noise against the float network.

    An ONNX file is run by ONNX Runtime on the CPU.

    Example: `bitwright evaluate zoo:fashion_cnn 'zoo:fashion-test[:1000]'`
    """

    model: str = argument("MODEL", "A run folder, an ONNX file, or a float network as for quantize")
    images: str = opt.images_argument()
    labels: str | None = opt.labels_option()
    float_model: str | None = option(
        "The float network to compare with; a run knows its own, unless it is Python code", flag="--float"
    )
    output: str | None = opt.output_option()
    classes: list[str] | None = option(
        "Axis of an output that holds its classes, or none, where that is not told right; repeatable",
        metavar="NAME=AXIS",
    )
    reading: opt.ImageOptions = opt.ImageOptions()


@dataclass(frozen=True)
class InspectCall(Call):
    """Shows every tensor that is quantized, every one that is not and why; parameters, MACs and sizes.

    For a float network: what would be quantized with these bits and rules, or with `--plan`. For a run: what was.

    Example: `bitwright inspect zoo:fashion_vit --weights 4`
    """

    model: str = argument("MODEL", "A run folder, or a float network as for quantize")
    weights: str = opt.weights_option()
    bits: opt.BitOptions = opt.BitOptions()
    output: str | None = opt.output_option()
    input_size: str | None = opt.input_size_option()
    blocks: bool = option("Show the blocks: attention, MLPs, residual branches, chains", False)

    def check(self) -> None:
        """Reads bits and the plan."""
        self.bits.scheme(self.weights)


@dataclass(frozen=True)
class SensitivityCall(Call):
    """The curvature of a network's weights without labels: traces, eigenvalues, spectrum; which layers need bits.

    Writes sensitivity.json (everything measured, layer by layer, block by block) and sensitivity.html (a plot,
    offline). With labels, the Hessian of cross-entropy instead.

    Example: `bitwright sensitivity zoo:fashion_cnn zoo:fashion --samples 32`
    """

    network: opt.NetworkOptions
    bits: int = option("Bits of weights at which layers are ranked: 2 to 8", 4)
    matrix: str | None = option(
        "fisher and squared need no label; hessian is that of cross-entropy  [default: hessian with --labels, "
        "fisher without]"
    )
    labels: str | None = opt.labels_option()
    samples: int | None = option("How many of the images to use  [default: 64 at most]")
    eigenvalues: int = option("Eigenvalues per layer, per block and of the network; 0 saves most of the time", 1)
    steps: int = option("Passes over the images for eigenvalues and densities, at most", 20)
    spectrum_samples: int = option("Images to use for eigenvalues and densities, at most", 32)
    probes: int = option("Random vectors for traces in each batch, at most", 32)
    tolerance: float = option("Relative standard error of traces that is good enough", 0.05)
    channels: float | None = option("Which output channels HAP would prune, for this share of all; 0 to 1")
    out: Path | None = option("Folder for the two files  [default: sensitivity]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    force: bool = opt.force_files_option()


@dataclass(frozen=True)
class PlanCall(Call):
    """Bits for every layer within limits, and the curve of what other limits would give.

    Measures what each choice of bits costs each layer, finds the plan that loses least, and writes plan.json (edit it,
    give it to `quantize --plan`), pareto.json (every point of the curve) and plan.html (a plot, offline). Without a
    limit the plan is as large as 4 bits everywhere. Losses are kept, so that the next plan takes seconds.

    Example: `bitwright plan zoo:fashion_cnn zoo:fashion --target-size 100kB --out plan-100kB`
    """

    network: opt.NetworkOptions
    limits: opt.PlanLimitOptions = opt.PlanLimitOptions()
    point: int | None = option("This point of the curve instead of a limit; the table and pareto.json number them")
    weights: str = opt.bits_option("Bits of weights to choose among", "2,3,4,5,6,8")
    activations: str = opt.bits_option("Bits of activations to choose among, as in 4,8,16; or float", "8")
    rule: list[str] | None = opt.rule_option()
    recipe: str | None = opt.recipe_option()
    measure: str = opt.measure_option()
    by: str | None = option(
        "What the curve runs along: size, activations, total, bops or latency  [default: what is limited]"
    )
    points: int = option("Points of the curve", 33)
    samples: int | None = option("Images to measure losses on  [default: 16 to 256]")
    cache: Path | None = opt.cache_option()
    out: Path | None = option("Folder for the three files  [default: plan]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    grid: opt.GridOptions = opt.GridOptions()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    force: bool = opt.force_files_option()

    def check(self) -> None:
        """Reads limits and bits."""
        _ = self.goal, self.scheme

    @cached_property
    def goal(self) -> Goal:
        """The limits, if there are any, and the bits to choose among."""
        return self.limits.goal(self.weights, self.activations, self.measure)

    @cached_property
    def scheme(self) -> Scheme:
        """What is fixed: rules, runtime and granularity."""
        return self.grid.scheme("8", "8", self.rule)


@dataclass(frozen=True)
class ExportCall(Call):
    """Writes a run for another runtime and checks it there on real images, layer by layer and as a whole.

    A file that computes something else than what was measured is refused, naming the first layer that diverges.

    Example, after `bitwright demo`: `bitwright export demo/fashion_cnn`
    """

    run: str = argument("RUN", "A run folder")
    to: str = option("onnx, openvino, pt2, tensorrt, executorch, tables or encodings", "onnx")
    images: str | None = option("Images for the check  [default: those of the run, if they are still there]")
    samples: int = option("Images to check on", 128)
    out: Path | None = option(
        "File to write  [default: model.onnx, .xml, .pt2 or .pte, model_tensorrt.onnx, tables.json, model_float.onnx]"
    )
    reading: opt.ImageOptions = opt.ImageOptions()
    force: bool = option("Keep a file that fails the check", False)


@dataclass(frozen=True)
class CompareCall(Call):
    """Compares recipes on the same network, images, bits, seed and budget: a run folder each, a table, a page.

    A recipe that fails is shown as failed and does not stop the others; the exit code is then 1.

    Example: `bitwright compare zoo:fashion_cnn zoo:fashion --recipes rtn,mse --weights 4`
    """

    network: opt.NetworkOptions
    recipes: str = option("Names or files of recipes, as in rtn,mse,eptq", MISSING)
    weights: str = opt.weights_option()
    bits: opt.BitOptions = opt.BitOptions()
    data: opt.DataOptions = opt.DataOptions()
    out: Path | None = option("Folder for the run folders and the page  [default: comparison]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    steps: int | None = opt.budget_option("Steps of the optimisation, in each recipe that has one")
    minutes: float | None = opt.budget_option("Minutes for each recipe, instead of --steps")
    precision: str = opt.precision_option()
    resume: bool = option("Keep the runs in --out that are finished, and go on with the others", False)
    force: bool = option("Replace the runs in --out", False)
    no_images: bool = opt.no_images_option()

    def check(self) -> None:
        """Reads bits and the plan."""
        self.bits.scheme(self.weights)
        self.each.check()

    @cached_property
    def each(self) -> QuantizeCall:
        """What all runs share."""
        budget = opt.BudgetOptions(None if self.steps is None else str(self.steps), self.minutes, self.precision)
        own = {field.name for field in fields(self)} - {"recipes", "out", "steps", "minutes", "precision"}
        return QuantizeCall(budget=budget, **{name: getattr(self, name) for name in own})


@dataclass(frozen=True)
class ReportCall(Call):
    """Writes report.html of a run again, or a page that compares several runs: accuracy against size.

    Takes what the run left (result.json, report.json, bench.json and parity.json if there are); needs no model and no
    images. The page is one file and opens offline.

    Example, after `bitwright demo`: `bitwright report demo/fashion_cnn`
    """

    begins: ClassVar[str] = "Loading"
    runs: list[str] = argument("RUN...", "A run folder; several are compared")
    out: Path | None = option("The page to write  [default: report.html in the run; comparison.html for several]")


@dataclass(frozen=True)
class BenchCall(Call):
    """Times a run's ONNX file and the float network in turn: latency, throughput, memory; writes bench.json.

    Medians and quartiles of each, and of the ratio, round by round, so that a machine that speeds up or slows down
    does so for both. Close other programs first.

    Example, after `bitwright demo`: `bitwright bench demo/fashion_cnn --seconds 5`
    """

    begins: ClassVar[str] = ""
    run: str = opt.run_argument()
    batch: str = opt.batch_option("1,32")
    threads: str | None = option(
        "Threads of the runtime; several are measured one by one  [default: 1 and all there are]"
    )
    seconds: float = option("Seconds for all timings together, without warming up", 20.0)
    runtime: list[str] | None = opt.runtime_option()


@dataclass(frozen=True)
class ParityCall(Call):
    """What quantization cost and what the runtime adds, as two figures; which operator errs, in how many codes.

    Compares the float network, the simulation that was measured, an exact integer reference and the file in its
    runtimes. Writes parity.json into the run folder. Ends with exit code 1 if the file computes something else.

    Example, after `bitwright demo`: `bitwright parity demo/fashion_cnn`
    """

    run: str = opt.run_argument()
    images: str | None = argument(
        "IMAGES", "Images, as for quantize  [default: those of the run, if they are still there]", None
    )
    runtime: list[str] | None = opt.runtime_option()
    batch: str = opt.batch_option("1,8")
    samples: int = option("Images to compare on, evenly spread, at most", 32)
    float_model: str | None = option("The float network; a run knows its own, unless it is Python code", flag="--float")
    reading: opt.ImageOptions = opt.ImageOptions()


@dataclass(frozen=True)
class RecipesCall(Call):
    """Lists the recipes, or prints one as YAML that `--recipe` reads back: copy it, change it, use it.

    Example: `bitwright recipes mse`
    """

    begins: ClassVar[str] = ""
    name: str | None = argument("NAME", "The recipe to print", None)


@dataclass(frozen=True)
class StudyCall(Call):
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

    name: str | None = argument("NAME", "The study to run; without it the studies are listed", None)
    model: str | None = argument("MODEL", "A network, as for quantize  [default: the two embedded networks]", None)
    images: str | None = argument("IMAGES", "Images to calibrate on, as for quantize", None)
    weights: str | None = opt.bits_option("Bits of weights: 2 to 8, or several, as in 3,4")
    activations: str | None = opt.bits_option("Bits of activations: 2 to 8, 16, or float")
    steps: int | None = opt.budget_option(
        "Steps of each optimisation; in iterations the most, in landscape half a side"
    )
    seeds: str | None = option("Seeds to repeat everything with, as in 0,1,2; spreads are over these")
    samples: int | None = option("Images to calibrate on; the most, in calibration-size")
    recipe: str | None = option("In mixed-precision: the recipe that quantizes  [default: eptq]")
    evaluate: str | None = option("Images to measure on; every fourth of IMAGES if not given")
    labels: str | None = opt.labels_option()
    out: Path | None = option("Folder for NAME.json and NAME.html  [default: studies]")
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    resume: bool = option("Go on with an interrupted study in --out", False)
    force: bool = option("Replace the files of an earlier study in --out", False)


@dataclass(frozen=True)
class DoctorCall(Call):
    """Versions and devices; what is missing or does not fit together, and the line that installs it.

    Example: `bitwright doctor`
    """

    begins: ClassVar[str] = "Looking around"


CALLS: tuple[type[Call], ...] = (
    DemoCall, QuantizeCall, EvaluateCall, InspectCall, SensitivityCall, PlanCall, ExportCall, CompareCall, ReportCall,
    BenchCall, ParityCall, RecipesCall, StudyCall, DoctorCall,
)  # fmt: skip
"""All verbs, in the order of ``bitwright --help``."""
