"""Does the label-free Hessian rank a network's layers as the true Hessian of a loss does?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from bitwright import zoo
from bitwright.curvature.label_free import label_free_scores
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, load_model
from bitwright.graph.points import linear_points
from bitwright.progress import Progress
from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.rows import Row, group
from bitwright.studies.subject import Subject
from bitwright.studies.traces import Loss, hessian_traces, scores_of
from bitwright.zoo.networks import CLASS_COUNT

LABEL_FREE = "label-free Hessian"
PROBES = 32
"""Second derivatives for each batch and loss."""
TEMPERATURE = 4.0
MIXER_STEPS = 150

# ------------------------------------------------------------------------------------------------- losses


def losses(scores: Tensor, labels: Tensor | None, seed: int) -> list[Loss]:
    """The losses whose Hessians are compared, with their targets.

    Args:
        scores: of the float network for all images, [N, K].
        labels: true classes, [N], if they are known.
        seed: of the random classes.
    """
    classes = scores.shape[1]
    drawn = torch.randint(0, classes, (len(scores),), generator=torch.Generator().manual_seed(seed))
    own = scores.argmax(1)
    found = [
        Loss("cross-entropy, the network's own class", _cross_entropy, own, 0.5),
        Loss("binary cross-entropy, its own class", _binary, F.one_hot(own, classes).float(), 0.25 / classes),
        Loss(f"KL at temperature {TEMPERATURE:g}, its own scores", _softened, scores, 0.5),
        Loss("squared error to a random class", _squared_error, F.one_hot(drawn, classes).float(), 2 / classes),
    ]
    if labels is not None:
        found.insert(1, Loss("cross-entropy, true labels", _cross_entropy, labels, 0.5))
    return found


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets, reduction="sum")


def _binary(scores: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1).sum()


def _squared_error(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores - targets).square().mean(1).sum()


def _softened(scores: Tensor, targets: Tensor) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(f / T))`` of distillation, whose gradient at ``f = t`` is zero."""
    soft = [(x / TEMPERATURE).log_softmax(1) for x in (scores, targets)]
    return TEMPERATURE**2 * F.kl_div(soft[0], soft[1], reduction="sum", log_target=True)


# ---------------------------------------------------------------------------------------------- measuring


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """The label-free trace, then each loss's, with each seed."""
    images = subject.held_out if subject.held_out.labels is not None else subject.pool
    images = images.sample(min(settings.samples, len(images)), seed=settings.seeds[0])
    names = [LABEL_FREE, *(loss.name for loss in losses(torch.zeros(1, 2), images.labels, 0))]
    for name in names:
        for seed in settings.seeds:
            yield Cell({"loss": name, "seed": seed}, partial(_measure, subject, images, name, seed))


def _measure(subject: Subject, images: Images, name: str, seed: int, progress: Progress) -> Row:
    graph = subject.teacher.graph
    points = linear_points(graph, subject.teacher.example.to(subject.device))
    about = {"layers": [p.layer for p in points], "images": len(images)}
    scores = _scores(subject, images)
    if name == LABEL_FREE:
        batches = (images.batch(range(i, min(i + 16, len(images)))) for i in range(0, len(images), 16))
        found = label_free_scores(
            graph,
            (b.to(subject.device) for b in batches),
            points,
            probes=2 * PROBES,
            least=2 * PROBES,
            seed=seed,
        )
        trace = found.layer_trace
        return {**about, "trace": trace.tolist(), "error": (found.error * trace).tolist()}
    loss = next(x for x in losses(scores, images.labels, seed) if x.name == name)
    traces = hessian_traces(
        graph, images, points, loss, probes=PROBES, seed=seed, device=subject.device, progress=progress
    )
    bound = loss.bound * scores.shape[1] / 2  # in units of the label-free trace, which is 2/k Tr(J^T J)
    return {**about, "trace": traces.mean.tolist(), "error": traces.error.tolist(), "bound": bound}


def _scores(subject: Subject, images: Images) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [scores_of(list(subject.teacher.graph(b.to(subject.device)))).cpu() for b in images.batches(50)]
        )


def summarise(rows: list[Row]) -> list[Row]:
    """Correlations of each loss's traces with the label-free ones over the layers, by network and loss."""
    free = {(r["network"], r["seed"]): r["trace"] for r in rows if r["loss"] == LABEL_FREE}
    compared = [
        {k: r[k] for k in ("network", "loss", "seed")} | correlations(r, free[r["network"], r["seed"]])
        for r in rows
        if r["loss"] != LABEL_FREE
    ]
    return group(compared, ("network", "loss"), ("pearson", "pearson_log", "spearman", "below_bound", "layers"))


def correlations(row: Row, free: list[float]) -> Row:
    """Of a row's traces with the label-free ones.

    Returns:
        ``pearson`` of the traces, ``pearson_log`` of their logarithms over the layers where both are positive (None
        where those are fewer than half), ``spearman``; None with fewer than three layers. ``below_bound``: the share of
        layers whose trace is not above the bound by more than two standard errors. ``layers``: how many have logs.
    """
    true, label_free = np.asarray(row["trace"]), np.asarray(free)
    both = (true > 0) & (label_free > 0)
    enough = 2 * both.sum() >= len(both)
    slack = 2 * np.asarray(row["error"]) + 1e-6 * np.abs(label_free)
    return {
        "pearson": _correlation(stats.pearsonr, true, label_free),
        "pearson_log": _correlation(stats.pearsonr, *map(np.log10, (true[both], label_free[both]))) if enough else None,
        "spearman": _correlation(stats.spearmanr, true, label_free),
        "below_bound": float((true <= row["bound"] * label_free + slack).mean()),
        "layers": int(both.sum()),
    }


def _correlation(how: Any, a: Any, b: Any) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    found = float(how(a, b)[0])
    return found if math.isfinite(found) else None


# -------------------------------------------------------------------------------------------- third network


class Mixer(nn.Module):
    """An MLP-mixer for images of 28 x 28: the third architecture.

    Example:
        >>> Mixer().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, dim: int = 48, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 7, stride=7)
        self.blocks = nn.ModuleList(_MixerBlock(16, dim) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm2(x))
        return out


def three_networks(progress: Progress) -> list[Model]:
    """The two embedded networks, and a mixer trained for a few seconds to follow the convolutional one."""
    found = [load_model(f"zoo:{name}") for name in zoo.NETWORKS]
    first = found[0]
    assert isinstance(first.module, nn.Module)
    mixer = trained_mixer(first.module, load_images("zoo:fashion", first.preprocessing), progress, MIXER_STEPS)
    return [*found, Model(mixer, "mixer", first.preprocessing)]


def trained_mixer(teacher: nn.Module, images: Images, progress: Progress, steps: int) -> Mixer:
    """A mixer that follows the teacher's class probabilities; the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = Mixer()
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=2e-3)
    for step in range(steps):
        batch = images.batch(torch.randint(0, len(images), (64,), generator=order))
        with torch.no_grad():
            wanted = teacher(batch).log_softmax(1)
        optimizer.zero_grad()
        loss = F.kl_div(mixer(batch).log_softmax(1), wanted, reduction="batchmean", log_target=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress("Training a mixer", step + 1, steps)
    return mixer.eval()


# ------------------------------------------------------------------------------------------------- figure


def figure(result: StudyResult) -> Figure:
    """One row of panels for each network: log traces along the layers, and the correlations."""
    order = list(dict.fromkeys(r["loss"] for r in result.rows))
    looks = {loss: "reference" if loss == LABEL_FREE else colour(i) for i, loss in enumerate(order)}
    networks = list(dict.fromkeys(r["network"] for r in result.rows))
    headings = [
        "log10 of the trace of each layer, in order; mean of each line taken off",
        "correlation with label-free",
    ]
    return Figure([[_traces(result, n, looks), _correlations(result, n, looks)] for n in networks], headings, (2, 1))


def _traces(result: StudyResult, network: str, looks: dict[str, str]) -> Panel:
    seed = result.rows[0]["seed"]
    rows = [r for r in result.rows if r["network"] == network and r["seed"] == seed]
    drawn = [
        Series(
            range(1, len(r["layers"]) + 1),
            _centred(r["trace"]),
            looks[r["loss"]],
            ("line", "dot"),
            r["loss"],
            [f"{r['loss']}, {layer}: {trace:.3g}" for layer, trace in zip(r["layers"], r["trace"], strict=True)],
        )
        for r in rows
    ]
    return Panel(tuple(drawn), "layer, in order", network, height=15.0)


def _correlations(result: StudyResult, network: str, looks: dict[str, str]) -> Panel:
    kinds = {"pearson": "Pearson", "pearson_log": "Pearson of logs", "spearman": "Spearman"}
    rows = [s for s in result.summary if s["network"] == network]
    drawn = [
        Series(list(kinds.values()), [s.get(k, {}).get("mean") for k in kinds], looks[s["loss"]], ("bar",), s["loss"])
        for s in rows
    ]
    return Panel(tuple(drawn), height=15.0)


def _centred(trace: list[float]) -> list[float | None]:
    logs = [math.log10(t) if t > 0 else None for t in trace]
    known = [x for x in logs if x is not None]
    mean = sum(known) / max(len(known), 1)
    return [None if x is None else x - mean for x in logs]


STUDY = Study(
    name="lfh",
    summary="Label-free Hessian traces against true ones, layer by layer, for several losses and networks.",
    paper="arXiv:2309.11531v1",
    reproduces="The comparison of label-free Hessian scores with Hessian traces of several losses over the layers of "
    "three networks, with and without log-normalisation.",
    reading="A line that runs along the dashed one means that the label-free score ranks layers as that loss does. It "
    "leaves out a term that vanishes where the network fits the labels: random classes, which it does not fit, show "
    "that limit. The mixer is defined in this study and trained for a few seconds to follow the first network.",
    defaults=StudySettings(samples=64),
    cells=cells,
    summarise=summarise,
    figure=figure,
    networks=three_networks,
)
