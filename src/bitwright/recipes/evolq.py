"""Evol-Q (arXiv:2308.10814): evolution of quantization scales with a contrastive fitness, block by block.

``evolq`` searches from ranges of least error, ``eptq+evolq`` from what EPTQ leaves, whose integers it keeps. So close
to the float network infoNCE leads away from it, for it is least where a network tells images apart better than the
teacher does (docs/results.md has the figures), and squared error takes its place.
``evolq-paper`` has the settings of the paper's code: attention only, an absolute size of mutations, least squared error
for the ranges with matched spreads, and power-of-two factors at the inputs of normalisations, as FQ-ViT
(arXiv:2111.13824) has them. Unlike that code, the teacher is the float network, and the result is chosen on calibration
images: the code keeps the checkpoint that is best on the test set.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.eptq import CALIBRATED, NETWORK
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.evolve import Evolve
from bitwright.stages.population import Mutation

RECIPES = (
    Recipe(
        name="evolq",
        summary="Ranges of least error, then weight scales evolved block by block.",
        paper="arXiv:2308.10814",
        stages=(Calibrate(weights="mse", activations="mse", bias_correction="analytic"), Evolve()),
    ),
    Recipe(
        name="eptq+evolq",
        summary="EPTQ, then its weight scales evolved with the integers kept.",
        paper="arXiv:2309.11531v2, arXiv:2308.10814",
        stages=(
            *CALIBRATED,
            NETWORK,
            Evolve(meaning="keep", fitness="mse"),
        ),
    ),
    Recipe(
        name="evolq-paper",
        summary="The settings of Evol-Q's code, without its choice on the test set.",
        paper="arXiv:2308.10814",
        stages=(
            Calibrate(
                weights="mse",
                weight_power=2.0,
                activations="mse",
                bias_correction="analytic",
                match_spread=True,
                norm_inputs="ptf",
            ),
            Evolve(blocks=("attention",), mutation=Mutation(size=1e-3, absolute=True, share=1.0), race=0.0),
        ),
    ),
)
