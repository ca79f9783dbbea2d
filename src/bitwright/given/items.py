"""As many images of a data set, a loader or a generator as are used, and no more are read."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset


def evenly(total: int, n: int, seed: int = 0) -> list[int]:
    """One position out of each of ``n`` equal stretches of ``total``, in order; the seed picks within the stretch.

    Example:
        >>> evenly(3, 3), len(evenly(100, 10))
        ([0, 1, 2], 10)
    """
    pick = random.Random(seed)
    return [pick.randrange(i * total // n, (i + 1) * total // n) for i in range(n)]


def items(source: Any, most: int | None) -> Iterator[Any]:
    """What a source gives, item after item.

    Where its length is known, the ``most`` items are spread evenly over it, as they are over a folder. Otherwise they
    are the first. A data set that never raises IndexError ends at its length.

    Args:
        source: a data set, a loader, a sequence, or anything to iterate over.
        most: images that are used; None for all.
    """
    if isinstance(source, DataLoader):
        return iter(_spread_loader(source, most))
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, list | tuple):
        total = len(source)
        return (source[i] for i in (range(total) if most is None or most >= total else evenly(total, most)))
    return iter(source)


def _spread_loader(loader: DataLoader[Any], most: int | None) -> Iterable[Any]:
    """The loader over those items of its data set that are used, where it takes them in order."""
    plain = isinstance(loader.sampler, SequentialSampler) and type(loader.batch_sampler) is BatchSampler
    if not plain or most is None or most >= len(loader.dataset):  # type: ignore[arg-type]
        return loader
    some = Subset(loader.dataset, evenly(len(loader.dataset), most))  # type: ignore[arg-type]
    return DataLoader(
        some, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers, timeout=loader.timeout
    )
