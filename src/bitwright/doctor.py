"""What is installed, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from bitwright._version import __version__

REQUIRED = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pillow",
    "pydantic",
    "safetensors",
    "scipy",
)
OPTIONAL = {
    "timm": "timm: models",
    "torchvision": "torchvision: models",
    "openvino": "export --to openvino",
    "plotly": "study landscape",
}
EXTRAS = {"openvino": "openvino", "plotly": "studies"}
"""Extras of the package that bring an optional one, where that is not ``models``."""
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}


@dataclass
class Finding:
    """One package: its version, whether it works, and what to do if not."""

    name: str
    version: str | None
    ok: bool
    note: str = ""
    remedy: str = ""


@dataclass
class ComputeDevice:
    """A device that this torch can use, and its threads or its memory."""

    device: str
    name: str
    threads: int | None = None
    memory_bytes: int | None = None


@dataclass
class Examination:
    """Everything that ``bitwright doctor`` tells; ``ok`` if nothing required is missing or broken."""

    ok: bool
    bitwright: str
    python: str
    platform: str
    cores: int | None
    disk_free_bytes: int
    devices: list[ComputeDevice]
    runtimes: list[str]
    zoo: dict[str, bool]
    required: list[Finding]
    optional: list[Finding]


def examine() -> Examination:
    """Looks at this machine."""
    required = [_package(name, "pip install --upgrade bitwright") for name in REQUIRED]
    optional = [
        _package(name, f"pip install 'bitwright[{EXTRAS.get(name, 'models')}]'", what)
        for name, what in OPTIONAL.items()
    ]
    if required[0].ok:
        optional = [_torchvision_built_for(f) if f.name == "torchvision" else f for f in optional]
    return Examination(
        ok=all(f.ok for f in required),
        bitwright=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        disk_free_bytes=shutil.disk_usage(".").free,
        devices=devices() if required[0].ok else [],
        runtimes=_runtimes() if any(f.name == "onnxruntime" and f.ok for f in required) else [],
        zoo=_zoo(),
        required=required,
        optional=optional,
    )


def _package(name: str, remedy: str, what: str = "") -> Finding:
    note = f"for {what}" if what else ""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, None, False, f"not installed{', needed ' + note if note else ''}", remedy)
    if what:
        return Finding(name, version, True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(MODULES.get(name, name))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        return Finding(name, version, False, f"does not import: {reason}", f"pip install --force-reinstall {name}")
    return Finding(name, version, True)


def _torchvision_built_for(found: Finding) -> Finding:
    """Says when torchvision's compiled part does not load, which bitwright works around."""
    if found.version is None:
        return found
    import torch

    parts = [part for home in _homes("torchvision") for part in home.glob("_C.*")]
    try:
        for part in parts:
            torch.ops.load_library(part)  # type: ignore[no-untyped-call]
    except OSError:
        parts = []
    if parts:
        return found
    note = f"its compiled part was built for another torch than {torch.__version__}; bitwright works without it"
    plain = found.version.split("+")[0]
    source = "" if torch.version.cuda else " --index-url https://download.pytorch.org/whl/cpu"
    return Finding(
        found.name, found.version, True, note, f"pip install --force-reinstall --no-deps torchvision=={plain}{source}"
    )


def _homes(package: str) -> list[Path]:
    """The folders of a package, which is not imported: torchvision's import would take longer than all the rest."""
    spec = importlib.util.find_spec(package)
    return [Path(home) for home in (spec and spec.submodule_search_locations) or ()]


def devices() -> list[ComputeDevice]:
    """The CPU and every CUDA device that this torch can use."""
    import torch

    found = [ComputeDevice("cpu", platform.processor() or platform.machine(), threads=torch.get_num_threads())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(ComputeDevice(f"cuda:{index}", about.name, memory_bytes=about.total_memory))
    return found


def _runtimes() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _zoo() -> dict[str, bool]:
    """Whether each embedded network is there."""
    from bitwright import zoo

    home = Path(zoo.__file__).parent
    return {name: (home / f"{name}.safetensors").is_file() for name in zoo.NETWORKS}
