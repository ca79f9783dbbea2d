"""Trains the zoo's networks again: `python -m bitwright.zoo.train`.

Only the training split of Fashion-MNIST is learned from; the test split is used once, after the last epoch,
to measure the weights as they are stored (float16 for every tensor of two or more dimensions).
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save as serialize
from torch import Tensor, nn

from bitwright.errors import DataError
from bitwright.zoo import preprocessing
from bitwright.zoo.fashion import DEFAULT_DIR, ZOO_DIR, read_split
from bitwright.zoo.networks import BUILDERS

SHIFT = 1


@dataclass(frozen=True)
class Training:
    """How one network is trained."""

    epochs: int
    peak_lr: float
    weight_decay: float
    batch: int = 128
    smoothing: float = 0.05
    channels_last: bool = False


TRAININGS = {
    "fashion_cnn": Training(epochs=12, peak_lr=6e-3, weight_decay=0.05, channels_last=True),
    "fashion_vit": Training(epochs=15, peak_lr=2e-3, weight_decay=0.05),
}


def normalized(images: NDArray[np.uint8], name: str) -> Tensor:
    """Turn images (N, 28, 28, 1) into the network's input, (N, 1, 28, 28) in float32."""
    settings = preprocessing(name)
    pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    return ((pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).contiguous()


def _augmented(padded: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Crop the chosen images out of their padded versions, half of them mirrored."""
    size, count = padded.shape[-1] - 2 * SHIFT, len(chosen)
    offset = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    steps = torch.arange(size)
    rows = offset[0] + steps
    columns = offset[1] + torch.where(flip, steps.flip(0), steps)
    return padded[chosen[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _batches(padded: Tensor, labels: Tensor, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order[: len(order) // batch * batch].view(-1, batch):
        yield _augmented(padded, chosen, generator), labels[chosen]


def _optimizer(model: nn.Module, recipe: Training) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, fused=True)


def _epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    smoothing: float,
) -> float:
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def train(name: str, images: NDArray[np.uint8], labels: NDArray[np.uint8], epochs: int, seed: int) -> nn.Module:
    """Train a network from scratch and return it in eval mode, as it is after the last epoch."""
    recipe = TRAININGS[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = BUILDERS[name]()
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = normalized(images, name)
    padded = F.pad(inputs, (SHIFT,) * 4, value=float(inputs.min()))
    targets = torch.from_numpy(labels.astype(np.int64))
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.peak_lr,
        total_steps=epochs * (len(targets) // recipe.batch),
        pct_start=0.2,
        cycle_momentum=False,
    )
    for epoch in range(epochs):
        started = time.monotonic()
        batches = _batches(padded, targets, recipe.batch, generator)
        loss = _epoch(model, batches, optimizer, schedule, recipe.smoothing)
        seconds = time.monotonic() - started
        print(f"{name} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: NDArray[np.uint8]) -> float:
    """Return the top-1 accuracy, 0 to 1."""
    found = torch.cat([model(x).argmax(1) for x in torch.split(inputs, 500)])
    return float((found.numpy() == labels).mean())


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the state as it is stored: float16 for tensors of two or more dimensions."""
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


def save_network(
    model: nn.Module, path: Path, name: str, test: tuple[Tensor, NDArray[np.uint8]], facts: dict[str, str]
) -> float:
    """Round and store the weights, with their measured accuracy and the given facts; returns the accuracy."""
    state = stored(model)
    model.load_state_dict(state)
    top1 = accuracy(model, *test)
    metadata = {
        "name": name,
        "test_top1": f"{top1:.4f}",
        "test_images": str(len(test[1])),
        "data": "Fashion-MNIST, (c) 2017 Zalando SE, MIT licence",
        **facts,
    }
    path.write_bytes(serialize(state, metadata=metadata))
    return top1


def _run(args: argparse.Namespace) -> None:
    images, labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "test")
    for name in [args.only] if args.only else list(TRAININGS):
        started = time.monotonic()
        epochs = args.epochs or TRAININGS[name].epochs
        model = train(name, images, labels, epochs, args.seed)
        test = (normalized(test_images, name), test_labels)
        exact = accuracy(model, *test)
        path = args.out / f"{name}.safetensors"
        top1 = save_network(model, path, name, test, {"seed": str(args.seed), "epochs": str(epochs)})
        minutes = (time.monotonic() - started) / 60
        print(
            f"{name}: test top-1 {exact:.2%} after the last epoch, {top1:.2%} as stored; "
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {minutes:.1f} min, {path}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bitwright.zoo.train", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DIR, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=ZOO_DIR, help="folder to write the weights to")
    parser.add_argument("--only", choices=list(TRAININGS), help="train this network only")
    parser.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"expected one epoch or more, found {args.epochs}")
    try:
        _run(args)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
