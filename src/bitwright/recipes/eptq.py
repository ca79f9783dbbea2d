"""EPTQ (arXiv:2309.11531): the whole network optimised at once, guided by a label-free Hessian.

``eptq`` follows version 2 of the paper (a score per sample and layer), ``eptq-lfh`` version 1 (one per layer).
Both start from closed-form roundings instead of rounding to nearest, which is worth more than any number of steps that
a small budget allows, and dampen their codes, which without it flip between integers, more of them the longer a run is.
Version 2's scores are put on version 1's log scale across layers: as they are, nearly all weight lies on the last
layer, which fits the calibration images too closely (docs/results.md has the figures). The papers' own settings are
``eptq-paper`` and ``eptq-lfh-paper``. For version 2 the regularizer has weight 10, as in its authors' library; the 0.01
of the paper's code, where distances are sums over channels too, leaves many roundings undecided.
"""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.cascade import Cascade
from bitwright.stages.optq import Optq
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Anneal, Dampen, Gradual, Learn

CALIBRATED = (
    Calibrate(weights="mse", activations="mse", bias_correction="analytic"),
    Optq(views="auto"),
    Cascade(bits=4, views="auto"),
)
NETWORK = Reconstruct(weigh="sla-log", codes=Learn(rate=1e-3), decide=Dampen(), views="auto")

RECIPES = (
    Recipe(
        name="eptq",
        summary="Closed-form roundings, then the whole network optimised at once, every sample and layer weighted.",
        paper="arXiv:2309.11531v2",
        stages=(*CALIBRATED, NETWORK),
    ),
    Recipe(
        name="eptq-lfh",
        summary="The same with one weight a layer, the log of its label-free Hessian trace.",
        paper="arXiv:2309.11531v1",
        stages=(*CALIBRATED, NETWORK.model_copy(update={"weigh": "lfh"})),
    ),
    Recipe(
        name="eptq-paper",
        summary="The settings of EPTQ's second paper: Hessian-weighted ranges, soft roundings, 80,000 steps.",
        paper="arXiv:2309.11531v2",
        stages=(
            Calibrate(weights="hmse", activations="mse", score_probes=100),
            Reconstruct(
                weigh="sla",
                steps=80_000,
                score_probes=100,
                score_error=1e-3,
                rounding="soft",
                codes=Learn(optimizer="radam", rate=1e-2, schedule="constant"),
                weight_step=Learn(rate=1e-4, schedule="constant"),
                bias=Learn(rate=1e-4, schedule="constant"),
                activation_step=Learn(rate=4e-5, schedule="cosine"),
                decide=Anneal(weight=10.0),
                gradual=Gradual(how="linear"),
            ),
        ),
    ),
    Recipe(
        name="eptq-lfh-paper",
        summary="The settings of EPTQ's first paper: soft roundings, one weight a layer, 80,000 steps.",
        paper="arXiv:2309.11531v1",
        stages=(
            Calibrate(weights="mse", activations="mse", weight_power=2.0),
            Reconstruct(
                weigh="lfh",
                over="mean",
                steps=80_000,
                views=8,
                score_images=16,
                score_probes=100,
                score_error=1e-3,
                score_distribution="gaussian",
                rounding="soft",
                codes=Learn(optimizer="radam", rate=3e-2, schedule="constant"),
                weight_step=Learn(optimizer="sgd", rate=1e-3, schedule="constant"),
                bias=Learn(optimizer="sgd", rate=1e-3, schedule="constant"),
                activation_step=None,
                decide=Anneal(weight=0.01),
            ),
        ),
    ),
)
