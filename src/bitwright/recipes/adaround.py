"""AdaRound (arXiv:2004.10568): every layer's roundings, up or down, so that its output changes least.

Layer after layer, from the inputs that the rounded layers before it give, towards the float network's output behind the
activation. Steps are fixed, activations stay in float meanwhile. The paper takes 10,000 steps for each layer at a rate
of 1e-3; this takes 500 at 3e-2, so that roundings still decide: ``--steps 10000`` with a rate of 1e-3 is the paper's.
"""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Anneal, Learn

LAYERWISE_START = Calibrate(weights="mse", activations="mse")
ROUNDING = Reconstruct(
    unit="layer",
    steps=500,
    weigh="ones",
    rounding="soft",
    codes=Learn(rate=3e-2, schedule="constant"),
    weight_step=None,
    bias=None,
    activation_step=None,
    decide=Anneal(weight=0.01, quiet=True),
    activations=False,
)

RECIPE = Recipe(
    name="adaround",
    summary="Roundings up or down, learned layer by layer.",
    paper="arXiv:2004.10568",
    stages=(LAYERWISE_START, ROUNDING),
)
