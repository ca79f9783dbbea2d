"""BRECQ (arXiv:2102.05426): roundings block by block with activations in float, then the steps of activations.

The loss at a block's exit is plain squared error, as in the authors' main script; the squared gradients of the paper
are ``weigh: fisher``. Steps of activations are learned on inputs from the float network. The paper takes 20,000 and
5,000 steps for each block at rates of 1e-3 and 4e-4.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.adaround import LAYERWISE_START, ROUNDING
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Learn

RECIPE = Recipe(
    name="brecq",
    summary="Roundings learned block by block, then the steps of activations.",
    paper="arXiv:2102.05426",
    stages=(
        LAYERWISE_START,
        ROUNDING.model_copy(update={"unit": "block"}),
        Reconstruct(
            unit="block",
            steps=250,
            float_inputs=1.0,
            weigh="ones",
            codes=None,
            weight_step=None,
            bias=None,
            activation_step=Learn(rate=4e-4),
        ),
    ),
)
