"""AutoRound (arXiv:2309.05516): roundings and steps of weights block by block, by the signs of gradients.

Each of 200 steps moves every code, and every step of weights, by the rate against the sign of its gradient. The rate
falls from 1/200 to 0, so that no code goes further than half a step in all. As in the paper, inputs come from the
quantized blocks before; unlike there, what is kept is the last state, where it is better than what was given.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.adaround import LAYERWISE_START
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Learn

SIGNED = Learn(optimizer="sign", rate=1 / 200, schedule="linear")

RECIPE = Recipe(
    name="autoround",
    summary="Roundings and steps of weights learned block by block, by the signs of gradients.",
    paper="arXiv:2309.05516",
    stages=(
        LAYERWISE_START,
        Reconstruct(
            unit="block",
            steps=200,
            batch=8,
            weigh="ones",
            codes=SIGNED,
            weight_step=SIGNED,
            bias=None,
            activation_step=None,
        ),
    ),
)
