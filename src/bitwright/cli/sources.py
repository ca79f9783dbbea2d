"""Where models and images of a command come from, and how a later command finds them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.export import ExportedProgram

from bitwright.cli.options import ImageOptions, NetworkOptions
from bitwright.errors import BitwrightError, UsageError
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, decoder_behind, decoder_beside, example_shapes, load_model, preprocessing_of
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing, has_channels_last
from bitwright.given.references import absolute_reference, absolute_source
from bitwright.given.several import input_names
from bitwright.given.text import short
from bitwright.given.two_stages import TwoStages, two_networks
from bitwright.graph.student import Student
from bitwright.measure.truth_files import labelled
from bitwright.run import folder as run_folder
from bitwright.run.files import first_existing, remove_empty
from bitwright.run.folder import check_writable
from bitwright.run.result import RunResult
from bitwright.terminal import Terminal
from bitwright.words import typed

DECODE_BATCH = 64


def images_at(
    source: str,
    network: Model | None,
    reading: ImageOptions,
    *,
    labels: str | None = None,
    class_map: str | None = None,
) -> Images:
    """The images of a command; every header is looked at now, so that a text file is found before the long work.

    Raises:
        DataError: there are none, one is no image, the labels do not match, or nobody said how to preprocess.
    """
    how = None if network is None else network.preprocessing
    if network is None and reading.preprocessing:
        how = preprocessing_of({}, reading.preprocessing)
    inputs = () if network is None else input_names(network.module)
    images = load_images(
        source,
        how,
        inputs=inputs,
        channels_last=network is not None and network.channels_last,
        skip_unreadable=reading.skip_unreadable,
        input_key=reading.input_key,
    )
    if not reading.skip_unreadable:
        images.check()
    return labelled(images, labels, class_map)


def decode_images(images: Images, terminal: Terminal) -> None:
    """Decodes every image, so that a corrupt one is found before the long work; what fits in memory is kept."""
    done = 0
    for batch in images.batches(DECODE_BATCH):
        done += len(batch)
        terminal.progress("Decoding the images to evaluate", done, len(images))


def sources(network: NetworkOptions, reading: ImageOptions) -> dict[str, Any]:
    """What a file says of where its network and images are."""
    return {
        "model": absolute_reference(network.model),
        "images": absolute_source(network.images),
        "preprocessing": reading.preprocessing,
        **({} if reading.input_key is None else {"input_key": reading.input_key}),
    }


def is_run(reference: str) -> bool:
    """Whether the reference names a run folder, or the quantized model in one."""
    return run_folder.holds_run(Path(reference).expanduser())


def load_run(reference: str) -> Student:
    """The quantized model of a run folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".onnx" and path.is_file():
        raise UsageError(
            f"Expected a run folder or its {run_folder.MODEL}, found the ONNX file {path}. Give {path.parent}."
        )
    return run_folder.load(path)


def float_network(run: Student, reference: str | None, reading: ImageOptions) -> Model:
    """The float network that a run was made from.

    Args:
        run: loaded.
        reference: where it is now, if not where it was.
        reading: how images become its input; as in the run if nothing is said.

    Raises:
        UsageError: nobody knows where it is, it cannot be loaded any more, or it is code that the user did not name.
    """
    recorded = RunResult.read(run.result).model
    check_preprocess(recorded.settings, reading)
    settings = reading.preprocessing or known_settings(recorded.settings)
    if reference is not None:
        return prepared_alike(load_model(reference, **settings), run.preprocessing, reading)
    where = recorded.reference
    if not where:
        raise UsageError("This run does not say which network it was made from. Give it with --float.")
    if is_code(where):
        raise UsageError(
            f"The network of this run is Python code ({where}), which runs only where you name it. "
            "Give it with --float if you trust it."
        )
    try:
        return load_model(where, **settings)
    except (BitwrightError, TypeError) as error:
        said = short(error)
        raise UsageError(f"The network of this run is not where it was ({said}). Give it with --float.") from error


def prepared_alike(
    network: Model, preprocessing: Preprocessing | PreprocessFunction | None, reading: ImageOptions
) -> Model:
    """A float network with the preprocessing of the run that was made from it, unless another is said now."""
    return network if preprocessing is None or reading.preprocessing else replace(network, preprocessing=preprocessing)


def decoder_of(run: Student) -> Callable[[Any], Any] | None:
    """What turns outputs of a run into boxes, where its own file, or the name of its float network, says that."""
    about = RunResult.read(run.result).model
    return decoder_behind(run.interface) or decoder_beside(about.reference, known_settings(about.settings))


def with_regions(run: Student, images: Images) -> Images:
    """Images with the regions that the run itself proposes, where it is a detector of two stages."""
    own = two_networks(run.graph, run.outputs, run.parts)
    between = None if own is None else decoder_of(run)
    return between.completed(images, own[0]) if own is not None and isinstance(between, TwoStages) else images


def check_preprocess(recorded: Mapping[str, Any] | None, reading: ImageOptions) -> None:
    """A function that prepared the images of a run is code, which runs only where the user names it.

    Raises:
        UsageError: there was one, and nothing is said now.
    """
    function = (recorded or {}).get("preprocess")
    if function is not None and not reading.preprocessing:
        raise UsageError(
            f"The images of this run went through {function}, Python code which runs only where you name it. "
            f"Give {typed('--preprocess', function)} if you trust it."
        )


def is_code(reference: str) -> bool:
    """Whether loading the network means running a Python file.

    Example:
        >>> is_code("net.py:net@weights.pt"), is_code("timm:resnet18@weights.pt")
        (True, False)
    """
    return not reference.startswith(("zoo:", "timm:", "torchvision:")) and Path(reference).suffix not in {
        ".pt2",
        ".onnx",
    }


def known_settings(recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of preprocessing in a result, without what nobody could have said on the command line."""
    known = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "channel_order", "pixel_bits")
    return {k: recorded[k] for k in known if k in recorded} if recorded else {}


def blank_images(network: Model) -> Images:
    """Two made-up images of the size the network takes, for commands that only look at its structure.

    Raises:
        UsageError: nobody said the size.
    """
    shapes = _input_shapes(network)
    if len(shapes) > 1:
        made = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
        return load_images(made, None, inputs=list(made))
    shape = _image_shape(network)
    if shape is None:
        raise UsageError("Expected to know the size of the network's images. Give --input-size.")
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return network.completed(load_images(noise, None, channels_last=has_channels_last(shape)))


def _image_shape(network: Model) -> tuple[int, ...] | None:
    how = network.preprocessing
    if isinstance(how, Preprocessing):
        return how.shape
    if how is not None:
        return tuple(torch.as_tensor(how(Image.new("RGB", (256, 256), (128, 128, 128)))).shape)
    return next(iter(_input_shapes(network).values()), None)


def _input_shapes(network: Model) -> dict[str, tuple[int, ...]]:
    """Of one image, of each input that a file names."""
    if network.source is not None:
        return {image.name: image.shape for image in network.source.inputs}
    return example_shapes(network.module) if isinstance(network.module, ExportedProgram) else {}


def load_inputs(
    network: NetworkOptions, reading: ImageOptions, terminal: Terminal, labels: str | None = None
) -> tuple[Model, Images]:
    """The network and its images, with the headers of all images looked at."""
    terminal.begin("Loading the network")
    found = load_model(network.model, **reading.preprocessing)
    return found, images_at(network.images, found, reading, labels=labels)


def check_output(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Looks at the folder that files are written into.

    Raises:
        UsageError: it is none, cannot be written, or holds one of the files that may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected a folder at {folder}, found a file. Choose another --out.")
    there = next((path for name in names if (path := folder / name).exists()), None)
    if there is not None and not force:
        raise UsageError(f"{there} is there already. Choose another --out, or replace it with --force.")
    check_writable(folder)


@contextmanager
def empty_removed(folder: Path) -> Iterator[None]:
    """Around what writes into a folder: if it fails, folders that it made and that are empty are gone again."""
    until = first_existing(folder)
    try:
        yield
    except BaseException:
        remove_empty(folder, until)
        raise
