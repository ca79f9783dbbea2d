"""Trains the zoo's segmenter and detector again, on scenes composed from the training split of Fashion-MNIST.

`python -m bitwright.zoo.train_dense`. The scenes of the test split are used once, after the last step, to measure the
weights as they are stored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.given.images import load_images
from bitwright.given.preprocessing import Preprocessing
from bitwright.measure.evaluation import compare
from bitwright.measure.task import Outputs
from bitwright.measure.tasks import Scoring
from bitwright.measure.truth_files import labelled
from bitwright.zoo import preprocessing
from bitwright.zoo.dense import DECODERS, DENSE_BUILDERS, corners, middles
from bitwright.zoo.fashion import read_split
from bitwright.zoo.scenes import SCENE_SIDE, Scenes, compose
from bitwright.zoo.train import fit, run_training, save_network, tell, training_options

SCENES, EPOCHS, BATCH, PEAK_LR = 16_000, 5, 32, 4e-3
TEST_SCENES, TEST_SEED = 1_000, 1
CENTRE = 0.3
"""Share of a box, around its middle, in which a place is to find it."""


def segmentation_loss(outputs: Tensor, scenes: Scenes, chosen: Any) -> Tensor:
    """Cross-entropy of scores [B, K, H, W] over the pixels of the chosen scenes."""
    return F.cross_entropy(outputs, torch.from_numpy(scenes.masks[chosen].astype(np.int64)))


def detection_loss(outputs: dict[str, Tensor], scenes: Scenes, chosen: Any) -> Tensor:
    """Focal loss of the scores (Lin et al. 2017) and GIoU of the boxes (Rezatofighi et al. 2019), per object."""
    scores, found = outputs["scores"], corners(outputs["sides"])
    wanted, boxes = (torch.stack(x) for x in zip(*(_places(scenes.boxes[i]) for i in chosen), strict=True))
    p = scores.sigmoid()
    sure = torch.where(wanted > 0, p, 1 - p)
    focal = (torch.where(wanted > 0, 0.25, 0.75) * (1 - sure) ** 2) * F.binary_cross_entropy_with_logits(
        scores, wanted, reduction="none"
    )
    there = wanted.amax(1) > 0
    count = there.sum().clamp_min(1)
    a, b = found.movedim(1, -1)[there], boxes.movedim(1, -1)[there]
    return (focal.sum() + 2 * (1 - giou(a, b)).sum()) / count


def _places(truth: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What each place is to say: scores (10, 16, 16) and corners (4, 16, 16), of the smallest box that it is in."""
    side = SCENE_SIDE // 4
    middle, scores, boxes = middles((side, side)), torch.zeros(10, side, side), torch.zeros(4, side, side)
    order = np.argsort(-(truth["boxes"][:, 2:] - truth["boxes"][:, :2]).prod(1))
    for k in order:
        box = torch.from_numpy(truth["boxes"][k]).float()
        centre, extent = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).clamp_min(8) * CENTRE
        inside = ((middle - centre[:, None, None]).abs() <= (extent / 2).clamp_min(2.1)[:, None, None]).all(0)
        scores[:, inside] = 0.0
        scores[int(truth["labels"][k]), inside] = 1.0
        boxes[:, inside] = box[:, None]
    return scores, boxes


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union of boxes (M, 4), pair by pair."""
    low, high = torch.max(a[:, :2], b[:, :2]), torch.min(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    around = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).prod(1)
    return shared / union - (around - union) / around


LOSSES: dict[str, Callable[[Any, Scenes, Any], Tensor]] = {
    "fashion_segmenter": segmentation_loss,
    "fashion_detector": detection_loss,
}


def train_on_scenes(name: str, scenes: Scenes, epochs: int, seed: int) -> nn.Module:
    """Train a network from scratch and return it in eval mode, as it is after the last step."""
    torch.manual_seed(seed)
    random, model = np.random.default_rng(seed), DENSE_BUILDERS[name]()
    how = Preprocessing(**preprocessing(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.02, fused=True)
    steps = len(scenes.images) // BATCH

    def losses() -> Iterator[Tensor]:
        for chosen in random.permutation(len(scenes.images))[: steps * BATCH].reshape(steps, BATCH):
            yield LOSSES[name](model(how.normalize(torch.from_numpy(scenes.images[chosen]))), scenes, chosen)

    return fit(name, model, optimizer, losses, steps, epochs)


def _measured(name: str, model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """The figures of the network's task on scenes."""
    truth: Any = scenes.masks if name == "fashion_segmenter" else scenes.boxes
    images = labelled(load_images(scenes.images, Preprocessing(**preprocessing(name))), truth)

    def network(x: Tensor) -> list[Tensor]:
        found = model(x)
        return list(found.values()) if isinstance(found, dict) else [found]

    outputs = Outputs(arranged=lambda flat: dict(zip(("scores", "sides"), flat, strict=False)) if flat[1:] else flat[0])
    scoring = Scoring(decode=DECODERS.get(name))
    found = compare(network, None, images, outputs=outputs, scoring=scoring).quantized
    assert found is not None
    return dict(found.values)


def _run(args: argparse.Namespace) -> None:
    scenes = compose(*read_split(args.data, "train"), args.scenes, args.seed)
    test = compose(*read_split(args.data, "test"), TEST_SCENES, TEST_SEED)
    for name in [args.only] if args.only else list(DENSE_BUILDERS):
        started, epochs = time.monotonic(), EPOCHS if args.epochs is None else args.epochs
        model = train_on_scenes(name, scenes, epochs, args.seed)
        facts = {
            "test_images": str(TEST_SCENES),
            "data": "scenes of Fashion-MNIST, (c) 2017 Zalando SE, MIT licence",
            "seed": str(args.seed),
            "epochs": str(epochs),
        }
        path = args.out / f"{name}.safetensors"
        figures = save_network(model, path, partial(_measured, name, model, test), facts)
        tell(f"{name}: {', '.join(f'{k} {v:.4f}' for k, v in figures.items())}", model, started, path)


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = training_options("train_dense", __doc__, DENSE_BUILDERS)
    parser.add_argument("--scenes", type=int, default=SCENES, help="that are learned from")
    args = parser.parse_args(argv)
    if (args.epochs is not None and args.epochs < 1) or args.scenes < BATCH:
        parser.error(f"expected an epoch and {BATCH} scenes or more")
    run_training(_run, args)


if __name__ == "__main__":
    main()
