"""FIMA-Q (arXiv:2506.11543): as QDrop, with a loss that knows what each block's error does to the outputs.

To squared errors, weighted element by element, comes the square of their sum along each image's gradient: a diagonal
and a part of low rank of the Fisher matrix. The paper takes the second from five to fifteen gradients that are averaged
over images and taken anew in the course of 20,000 steps.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.adaround import LAYERWISE_START
from bitwright.recipes.qdrop import DROPPING

RECIPE = Recipe(
    name="fima",
    summary="As qdrop, with a loss of a diagonal and a low-rank part of the Fisher matrix.",
    paper="arXiv:2506.11543",
    stages=(LAYERWISE_START, DROPPING.model_copy(update={"weigh": "low-rank"})),
)
