"""References to models and images that hold from any folder, and what tells whether a file is still the same."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def absolute_reference(reference: str) -> str:
    """The same model, found from any folder.

    Example:
        >>> absolute_reference("timm:resnet18"), absolute_reference("zoo:fashion_cnn")
        ('timm:resnet18', 'zoo:fashion_cnn')
    """
    kind, colon, rest = reference.partition(":")
    if colon and kind in {"zoo", "timm", "torchvision"}:
        name, at, weights = rest.partition("@")
        return f"{kind}:{name}{at}{os.path.abspath(os.path.expanduser(weights)) if at else ''}"
    script = re.fullmatch(r"(.+\.py:[^:@]+)@(.+)", reference)
    parts = script.groups() if script else (reference,)
    return "@".join(os.path.abspath(os.path.expanduser(part)) for part in parts)


def absolute_source(source: str) -> str:
    """The same images, found from any folder.

    Example:
        >>> absolute_source("zoo:fashion[:8]")
        'zoo:fashion[:8]'
    """
    return source if source.startswith("zoo:") else os.path.abspath(os.path.expanduser(source))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
