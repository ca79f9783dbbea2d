"""QDrop (arXiv:2203.05740): as BRECQ, with half of all activations quantized at random while roundings are learned.

Each element of every activation, and of every block's inputs, is the float network's with probability 0.5, drawn anew
in every step; steps of activations are learned with the roundings. The paper takes 20,000 steps for each block, at
rates of 1e-3 and 4e-5.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.adaround import LAYERWISE_START, ROUNDING
from bitwright.stages.schedules import Gradual, Learn

DROPPING = ROUNDING.model_copy(
    update={
        "unit": "block",
        "float_inputs": 0.5,
        "activations": True,
        "activation_step": Learn(rate=4e-5),
        "gradual": Gradual(how="drop", start=0.5, hold=True),
    }
)

RECIPE = Recipe(
    name="qdrop",
    summary="Roundings and activation steps learned block by block, half of the activations in float at random.",
    paper="arXiv:2203.05740",
    stages=(LAYERWISE_START, DROPPING),
)
