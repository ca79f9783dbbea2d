"""Trains the zoo's networks again: `python -m bitwright.zoo.train`.

Only the training split of Fashion-MNIST is learned from; the test split is used once, after the last epoch,
to measure the weights as they are stored (float16 for every tensor of two or more dimensions).
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
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


def fit(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[], Iterator[Tensor]],
    steps: int,
    epochs: int,
) -> nn.Module:
    """A step for every loss of every epoch, at a rate that rises to the optimizer's and falls again.

    Args:
        name: for what is printed.
        model: is returned in eval mode, as it is after the last step.
        optimizer: at its largest rate.
        losses: those of an epoch, each computed with the network as it is then.
        steps: of an epoch.
        epochs: how many there are.
    """
    peak = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(epochs):
        started, seen = time.monotonic(), []
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            seen.append(float(loss.detach()))
        seconds = time.monotonic() - started
        print(f"{name} epoch {epoch + 1}/{epochs}: loss {np.mean(seen):.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


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

    def losses() -> Iterator[Tensor]:
        for x, y in _batches(padded, targets, recipe.batch, generator):
            yield F.cross_entropy(model(x), y, label_smoothing=recipe.smoothing)

    return fit(name, model, _optimizer(model, recipe), losses, len(targets) // recipe.batch, epochs)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: NDArray[np.uint8]) -> float:
    """Return the top-1 accuracy, 0 to 1, on inputs [N, C, H, W] with labels [N]."""
    found = torch.cat([model(x).argmax(1) for x in torch.split(inputs, 500)])
    return float((found.numpy() == labels).mean())


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the state as it is stored: float16 for tensors of two or more dimensions."""
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


def save_network(
    model: nn.Module, path: Path, measure: Callable[[], dict[str, float]], facts: dict[str, str]
) -> dict[str, float]:
    """Rounds and stores the weights, with figures that are measured then, and facts; returns the figures."""
    state = stored(model)
    model.load_state_dict(state)
    figures = measure()
    measured = {f"test_{name}": f"{value:.4f}" for name, value in figures.items()}
    path.write_bytes(serialize(state, metadata={"name": path.stem, **measured, **facts}))
    return figures


def _run(args: argparse.Namespace) -> None:
    images, labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "test")
    for name in [args.only] if args.only else list(TRAININGS):
        started = time.monotonic()
        epochs = args.epochs or TRAININGS[name].epochs
        model = train(name, images, labels, epochs, args.seed)
        test = (normalized(test_images, name), test_labels)
        exact = accuracy(model, *test)
        facts = {
            "test_images": str(len(test_labels)),
            "data": "Fashion-MNIST, (c) 2017 Zalando SE, MIT licence",
            "seed": str(args.seed),
            "epochs": str(epochs),
        }
        path = args.out / f"{name}.safetensors"
        top1 = save_network(model, path, lambda: {"top1": accuracy(model, *test)}, facts)["top1"]  # noqa: B023 - at once
        tell(f"{name}: test top-1 {exact:.2%} after the last epoch, {top1:.2%} as stored", model, started, path)


def tell(figures: str, model: nn.Module, started: float, path: Path) -> None:
    """Prints what a training gave, since ``time.monotonic()`` was that."""
    minutes, parameters = (time.monotonic() - started) / 60, sum(p.numel() for p in model.parameters())
    print(f"{figures}; {parameters:,} parameters, {minutes:.1f} min, {path}", flush=True)


def training_options(module: str, described: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """The command line that both trainings have."""
    parser = argparse.ArgumentParser(prog=f"python -m bitwright.zoo.{module}", description=described)
    parser.add_argument("--data", type=Path, default=DEFAULT_DIR, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=ZOO_DIR, help="folder to write the weights to")
    parser.add_argument("--only", choices=list(names), help="train this network only")
    parser.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_training(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs, and says in one line what is wrong with the files.

    Raises:
        SystemExit: with that line.
    """
    try:
        run(args)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = training_options("train", __doc__, TRAININGS)
    args = parser.parse_args(argv)
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"expected one epoch or more, found {args.epochs}")
    run_training(_run, args)


if __name__ == "__main__":
    main()
