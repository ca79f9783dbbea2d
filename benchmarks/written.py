"""What a file of results says of the machine that made them."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec

from bitwright.speed.machine import cores, cpu_name


def where(*packages: str) -> dict[str, str]:
    """Date, processor, and the versions of Python and of those packages that are there."""
    software = [f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages if find_spec(p))]
    return {
        "date": date.today().isoformat(),
        "hardware": f"{cpu_name()}, {cores()} cores",
        "software": ", ".join(software),
    }
