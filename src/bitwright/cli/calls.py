"""The verbs of the command line: what each may be given, as a record whose docstring is the verb's help.

Nothing here imports PyTorch or pydantic before a value is asked for.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bitwright.cli import options as opt
from bitwright.cli.signature import Call, argument, option
from bitwright.errors import UsageError
from bitwright.given.arguments import SEEDS, a_time, one_of, whole_number

if TYPE_CHECKING:
    from bitwright.bits.goal import Goal
    from bitwright.quant.scheme import Scheme


@dataclass(frozen=True)
class DemoCall(Call):
    """Runs the whole job on two networks and images that ship with bitwright, in a few minutes and without downloads.

    Quantizes a small CNN and a small vision transformer to 4-bit weights and 8-bit activations from unlabelled
    images, scores both on 10,000 test images, writes ONNX files and checks these in ONNX Runtime. With `--task` it does
    the same with a small network that finds garments in scenes, as masks or as boxes.

    Example: `bitwright demo --out demo --force`
    """

    task: str = option("What the networks do: classification, segmentation or detection", "classification")
    out: Path = option("Folder for the run folders", Path("demo"))
    recipe: str | None = opt.recipe_option()
    seed: int = opt.seed_option()
    force: bool = option("Replace the runs of an earlier demo", False)


@dataclass(frozen=True)
class QuantizeCall(Call):
    """Quantizes a network with unlabelled images and writes a run folder: packed integers, ONNX file, measurements.

    Labels are never used to quantize, but by `--recipe qkd`, which trains with them. With `--evaluate` (and `--labels`,
    if the images bring none) they tell how accurate the result is. The ONNX file is checked in ONNX Runtime on real
    images before it is kept.

    With a limit (`--target-size`, `--compression`, `--max-bops`, `--max-latency`, `--max-drop`) bits are planned layer
    by layer; `bitwright plan` shows which plans there are.

    Example: `bitwright quantize zoo:fashion_cnn zoo:fashion --weights 4`
    """

    shared: ClassVar[bool] = True

    network: opt.NetworkOptions
    recipe: str | None = opt.recipe_option()
    weights: str | None = opt.bits_option(
        "Bits of weights: 2 to 8, or float; with a limit, bits to choose among  [default: 8, with a limit 2,3,4,5,6,8]"
    )
    bits: opt.BitOptions = opt.BitOptions()
    limits: opt.LimitOptions = opt.LimitOptions()
    measure: str = opt.measure_option()
    cache: Path | None = opt.cache_option()
    data: opt.DataOptions = opt.DataOptions()
    out: Path | None = option("Run folder to write  [default: runs/MODEL-RECIPE-w8a8]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    budget: opt.BudgetOptions = opt.BudgetOptions()
    resume: bool = option("Go on with the unfinished run in --out; start anew if there is none", False)
    force: bool = option("Replace a run in --out, finished or not, and keep an ONNX file that fails its check", False)
    no_images: bool = opt.no_images_option()
    no_report: bool = option("Do not write the page report.html", False)
    no_diagnosis: bool = option("Do not look for the layers that lose most and the rules that mend it", False)
    file_check: str = option("Check of the ONNX file: full, or fast, on three images", "full", flag="--check")
    dry_run: bool = option("Show what would be quantized, but calibrate nothing and write nothing", False)

    def check(self) -> None:
        """Reads limits, bits, the plan, counts and the budget."""
        if self.data.samples is not None:
            whole_number("samples", self.data.samples, least=1)
        whole_number("seed", self.seed, least=0, below=SEEDS)
        self.budget.check()
        one_of("check", self.file_check, ("full", "fast"))
        _ = self.goal, self.scheme

    @cached_property
    def goal(self) -> Goal | None:
        """The limits within which bits are planned first; None without limits.

        Raises:
            UsageError: a limit cannot be read, there is a plan already, or several bits are given without a limit.
        """
        if self.limits.given:
            if self.bits.plan is not None:
                raise UsageError(f"Expected --plan or --{self.limits.given[0].replace('_', '-')}, found both.")
            weights = "auto" if self.weights is None else self.weights
            dropping = self.limits.max_drop is not None and self.data.compared.named
            scored = self.data.compared.scoring if dropping else None
            return self.limits.goal(weights, self.bits.activations, self.measure, scored)
        for name, value in (("--weights", self.weights), ("--activations", self.bits.activations)):
            if "," in (value or ""):
                raise UsageError(f"Several bits ({name}) are for a plan: give a limit too, such as --compression 8.")
        self._check_unplanned()
        return None

    def _check_unplanned(self) -> None:
        """Refuses what says how to plan where nothing is planned."""
        from bitwright.bits.goal import MEASURE, Goal

        if self.measure != MEASURE:
            from bitwright.bits.planning import check_goal

            check_goal(Goal(measure=self.measure))
        for name, given in (("measure", self.measure != MEASURE), ("cache", self.cache is not None)):
            if given:
                raise UsageError(f"Expected a limit such as target_size= beside {name}=, found none.")

    @cached_property
    def scheme(self) -> Scheme:
        """The bits of all layers, with the plan in them if there is one."""
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
        """Whether activations that need 16 bits get them."""
        return self.bits.activations == "auto"


@dataclass(frozen=True)
class EvaluateCall(Call):
    """Measures accuracy with its 95 % interval, if there are labels, and agreement, KL and noise against float.

    ONNX Runtime runs an ONNX file on the CPU.

    Example: `bitwright evaluate zoo:fashion_cnn 'zoo:fashion-test[:1000]'`
    """

    model: str = argument("MODEL", "A run folder, an ONNX file, or a float network as for quantize")
    images: str = opt.images_argument()
    labels: str | None = opt.truth_option()
    compared: opt.ScoringOptions = opt.ScoringOptions()
    float_model: str | None = option(
        "The float network to compare with; a run knows its own, unless it is Python code", flag="--float"
    )
    output: str | None = opt.output_option()
    classes: list[str] | None = option(
        "Axis of an output along which its classes lie, or none, if bitwright does not find it; may be repeated",
        metavar="NAME=AXIS",
    )
    reading: opt.ImageOptions = opt.ImageOptions()


@dataclass(frozen=True)
class InspectCall(Call):
    """Shows which tensors are quantized, which are not and why, with parameters, MACs and sizes.

    For a float network it shows what would be quantized with these bits and rules, or with `--plan`; for a run, what
    was quantized.

    Example: `bitwright inspect zoo:fashion_vit --weights 4`
    """

    begins: ClassVar[str] = ""
    model: str = argument("MODEL", "A run folder, or a float network as for quantize")
    weights: str = opt.weights_option()
    bits: opt.BitOptions = opt.BitOptions()
    output: str | None = opt.output_option()
    input_size: str | None = opt.input_size_option()
    blocks: bool = option("Show the blocks of the network: attention, MLPs, residual branches and chains", False)

    def check(self) -> None:
        """Reads bits and the plan."""
        self.bits.scheme(self.weights)


@dataclass(frozen=True)
class SensitivityCall(Call):
    """Measures the curvature of a network's weights without labels, and tells which layers need more bits.

    Writes traces, eigenvalues and spectral densities of every layer and block to sensitivity.json and to the page
    sensitivity.html, which opens offline. With labels it measures the Hessian of cross-entropy instead.

    Example: `bitwright sensitivity zoo:fashion_cnn zoo:fashion --samples 32`
    """

    shared: ClassVar[bool] = True

    network: opt.NetworkOptions
    bits: int = option("Bits of weights at which layers are ranked: 2 to 8", 4)
    matrix: str | None = option(
        "Matrix: fisher or squared, which need no labels, or hessian, that of cross-entropy  [default: hessian with "
        "--labels, fisher without]"
    )
    labels: str | None = opt.labels_option()
    samples: int | None = option("Number of images to use  [default: at most 64]")
    eigenvalues: int = option("Eigenvalues per layer, per block and for the network; 0 saves most of the time", 1)
    steps: int = option("Most passes over the images for eigenvalues and densities", 20)
    spectrum_samples: int = option("Most images for eigenvalues and densities", 32)
    probes: int = option("Most random vectors per batch for traces", 32)
    tolerance: float = option("Relative standard error of traces at which probing ends", 0.05)
    channels: float | None = option("Also list the output channels that HAP would prune at this share, 0 to 1")
    out: Path | None = option("Folder for the two files  [default: sensitivity]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    force: bool = opt.force_files_option()

    def check(self) -> None:
        """Reads the number of images."""
        if self.samples is not None:
            whole_number("samples", self.samples, least=1)


@dataclass(frozen=True)
class PlanCall(Call):
    """Plans the bits of every layer within limits, and shows what other limits would give.

    Measures what each choice of bits costs each layer, finds the plan that loses least, and writes plan.json (which
    you can edit and give to `quantize --plan`), pareto.json (every point of the curve) and the page plan.html, which
    opens offline. Without a limit the plan is as large as one with 4 bits everywhere; with `--max-drop` plans are tried
    on images held out. Measured losses are kept, so that the next plan takes seconds.

    Example: `bitwright plan zoo:fashion_cnn zoo:fashion --target-size 100kB --out plan-100kB`
    """

    shared: ClassVar[bool] = True

    network: opt.NetworkOptions
    limits: opt.PlanLimitOptions = opt.PlanLimitOptions()
    compared: opt.FigureOptions = opt.FigureOptions()
    point: int | None = option("Point of the curve instead of a limit, by its number in pareto.json")
    weights: str = opt.bits_option("Bits of weights to choose among", "2,3,4,5,6,8")
    activations: str = opt.bits_option("Bits of activations to choose among, such as 4,8,16, or float", "8")
    rule: list[str] | None = opt.rule_option()
    recipe: str | None = opt.recipe_option()
    measure: str = opt.measure_option()
    by: str | None = option(
        "Cost along which the curve runs: size, activations, total, bops or latency  [default: the limited cost]"
    )
    points: int = option("Number of points of the curve", 33)
    samples: int | None = option("Number of images to measure losses on  [default: 16 to 256, by the measure]")
    cache: Path | None = opt.cache_option()
    out: Path | None = option("Folder for the three files  [default: plan]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    grid: opt.GridOptions = opt.GridOptions()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    force: bool = opt.force_files_option()

    def check(self) -> None:
        """Reads limits, bits and counts."""
        whole_number("points", self.points, least=2)
        _ = self.goal, self.scheme

    @cached_property
    def goal(self) -> Goal:
        """The limits, if there are any, and the bits to choose among."""
        scored = self.compared.scoring if any(asdict(self.compared).values()) else None
        return self.limits.goal(self.weights, self.activations, self.measure, scored)

    @cached_property
    def scheme(self) -> Scheme:
        """What the plan does not choose: rules, runtime and granularity."""
        return self.grid.scheme("8", "8", self.rule)


@dataclass(frozen=True)
class ExportCall(Call):
    """Writes a run as a file for another runtime and checks the file there on real images, per layer and as a whole.

    A file that does not compute what was measured is refused, and the error names the first layer that diverges.

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

    def check(self) -> None:
        """Reads the number of images."""
        whole_number("samples", self.samples, least=1)


@dataclass(frozen=True)
class CompareCall(Call):
    """Compares recipes on the same network, images, bits, seed and budget, in a table and on a page.

    Every recipe leaves a run folder. One that fails is shown as failed, and the others still run; the exit code is
    then 1. `--recipes all --minutes 2` tries every one that needs no labels.

    Example: `bitwright compare zoo:fashion_cnn zoo:fashion --recipes rtn,mse --weights 4`
    """

    network: opt.NetworkOptions
    recipes: str = option("Names or files of recipes, such as rtn,mse,eptq, or all: those that need no labels", MISSING)
    weights: str = opt.weights_option()
    bits: opt.BitOptions = opt.BitOptions()
    data: opt.DataOptions = opt.DataOptions()
    out: Path | None = option("Folder for the run folders and the page  [default: comparison]")
    seed: int = opt.seed_option()
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    steps: int | None = opt.budget_option("Steps of the optimisation, for every recipe that optimises")
    minutes: float | None = opt.budget_option("Minutes per recipe instead of --steps")
    precision: str = opt.precision_option()
    resume: bool = option(
        "Keep the finished runs in --out and go on with the others; start anew if there are none", False
    )
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
    """Writes report.html of a run again, or a page that compares the accuracy and size of several runs.

    It reads the files of the run (result.json, and report.json, bench.json and parity.json if they exist) and needs
    neither the model nor the images. The page is one file and opens offline.

    Example, after `bitwright demo`: `bitwright report demo/fashion_cnn`
    """

    begins: ClassVar[str] = "Loading"
    runs: list[str] = argument("RUN...", "A run folder, or several to compare")
    out: Path | None = option("Page to write  [default: report.html in the run; comparison.html for several runs]")


@dataclass(frozen=True)
class BenchCall(Call):
    """Measures latency, throughput and memory of a run's ONNX file and of the float network, and writes bench.json.

    The two are timed in turn, so that a machine that speeds up or slows down does so for both. The result has the
    median and quartiles of each and of their ratio. Of several runs each is timed beside its own float network, one run
    after the other. Close other programs first.

    Example, after `bitwright demo`: `bitwright bench demo/fashion_cnn --seconds 5`
    """

    begins: ClassVar[str] = ""
    runs: list[str] = argument("RUN...", "A run folder, or several")
    batch: str | None = option(
        "Images in one call; several numbers are measured one by one  [default: 1 and 32, where the file takes them]"
    )
    threads: str | None = option(
        "Threads of the runtime; several numbers are measured one by one  [default: 1, and one per core]"
    )
    seconds: float = option("Seconds for all timings of a run together, not counting warm-up", 20.0)
    runtime: list[str] | None = opt.runtime_option()

    def check(self) -> None:
        """Reads the seconds."""
        a_time("seconds", self.seconds, "seconds")


@dataclass(frozen=True)
class ParityCall(Call):
    """Tells what quantization cost, what the runtime adds, and which operators of the runtime differ in how many codes.

    Compares the float network, the simulation that was measured, an exact integer reference and the file in its
    runtimes, and writes parity.json into the run folder. The exit code is 1 if the file computes something else.

    Example, after `bitwright demo`: `bitwright parity demo/fashion_cnn`
    """

    run: str = opt.run_argument()
    images: str | None = argument(
        "IMAGES", "Images, as for quantize  [default: the images of the run, if they are still there]", None
    )
    runtime: list[str] | None = opt.runtime_option()
    batch: str = opt.batch_option("1,8")
    samples: int = option("Most images to compare on, spread evenly over IMAGES", 32)
    float_model: str | None = option("The float network; a run knows its own unless it is Python code", flag="--float")
    reading: opt.ImageOptions = opt.ImageOptions()

    def check(self) -> None:
        """Reads the number of images."""
        whole_number("samples", self.samples, least=1)


@dataclass(frozen=True)
class RecipesCall(Call):
    """Lists the recipes, or prints one as YAML, which you can change and give to `--recipe`.

    Example: `bitwright recipes mse`
    """

    begins: ClassVar[str] = ""
    name: str | None = argument("NAME", "The recipe to print", None)


@dataclass(frozen=True)
class StudyCall(Call):
    """Repeats a paper's analysis, and writes everything measured to NAME.json and a plot to NAME.html.

    Without MODEL and IMAGES a study runs on the networks and images that ship with bitwright, in a few minutes:

    - **lfh**: label-free Hessian traces compared with true ones, layer by layer, for several losses and networks

    - **weighting**: layers and samples weighted equally, by LFH, by SLA, or by both

    - **iterations**: how the result depends on the number of optimisation steps

    - **calibration-size**: how the result depends on the number of calibration images

    - **gradual**: activations quantized from the first step, or little by little

    - **hmse**: methods of choosing weight ranges, before any optimisation

    - **landscape**: how rough losses are over the weight scales of a block

    - **search**: weight scales found by evolution, random search and gradient descent, at equal cost

    - **fitness**: losses for evolution to minimise: infoNCE, squared error, cosine and KL

    - **around**: every recipe's result against the CPU seconds it took

    - **mixed-precision**: the same bits for all layers compared with plans, at each size of the file

    Example: `bitwright study weighting --steps 50 --seeds 0`
    """

    name: str | None = argument("NAME", "The study to run; without a name the studies are listed", None)
    model: str | None = argument("MODEL", "A network, as for quantize  [default: the two embedded networks]", None)
    images: str | None = argument("IMAGES", "Images to calibrate on, as for quantize", None)
    weights: str | None = opt.bits_option("Bits of weights: 2 to 8, or several numbers, such as 3,4")
    activations: str | None = opt.bits_option("Bits of activations: 2 to 8, 16, or float")
    steps: int | None = opt.budget_option(
        "Steps per optimisation; in iterations the largest number, in landscape the points on half a side"
    )
    seeds: str | None = option("Seeds to repeat the study with, such as 0,1,2; the spread is over these")
    samples: int | None = option("Number of images to calibrate on; in calibration-size the largest number")
    recipe: str | None = option("Recipe that quantizes, in mixed-precision only  [default: eptq]")
    as_published: bool = option(
        "In search only: Evol-Q's own start and search, and what choosing on test images adds to its gain", False
    )
    evaluate: str | None = option("Images to measure on  [default: every fourth of IMAGES]")
    labels: str | None = opt.labels_option()
    out: Path | None = option("Folder for NAME.json and NAME.html  [default: studies]")
    device: str = opt.device_option()
    output: str | None = opt.output_option()
    reading: opt.ImageOptions = opt.ImageOptions()
    resume: bool = option("Go on with the interrupted study in --out; start anew if there is none", False)
    force: bool = option("Replace the files of an earlier study in --out", False)


@dataclass(frozen=True)
class DoctorCall(Call):
    """Shows versions and devices, what is missing or does not fit together, and the command that installs it.

    Example: `bitwright doctor`
    """

    begins: ClassVar[str] = "Looking at what is installed"


CALLS: tuple[type[Call], ...] = (
    DemoCall, QuantizeCall, EvaluateCall, InspectCall, SensitivityCall, PlanCall, ExportCall, CompareCall, ReportCall,
    BenchCall, ParityCall, RecipesCall, StudyCall, DoctorCall,
)  # fmt: skip
"""All verbs, in the order of ``bitwright --help``."""
