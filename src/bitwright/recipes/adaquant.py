"""AdaQuant (arXiv:2006.10518): layer by layer, weights, steps and biases so that the layer's output changes least.

Weights move freely: they are rounded in every step and the gradient goes straight through. The paper takes 1,000 steps
for each layer, at rates of 1e-5 for weights, 1e-3 for biases and weight steps, 1e-1 for activation steps. Here codes
are in units of their step, and activation steps relative to theirs. Its integer program for bits is
``bitwright plan``. Its tuning of batch norms, which are folded here, and of biases by distillation are missing.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.adaround import START
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Learn

RECIPE = Recipe(
    name="adaquant",
    summary="Weights, steps and biases learned layer by layer.",
    paper="arXiv:2006.10518",
    stages=(
        START,
        Reconstruct(
            unit="layer",
            steps=500,
            batch=50,
            weigh="ones",
            codes=Learn(rate=3e-3),
            weight_step=Learn(rate=1e-3),
            bias=Learn(rate=1e-3),
            activation_step=Learn(rate=1e-3, relative=True),
        ),
    ),
)
