"""Images packed into few large files: tar archives as WebDataset has them, and Parquet tables as Hugging Face has them.

Only where each image lies is held in memory; its bytes are read when they are asked for.
"""

from __future__ import annotations

import io
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.files import Encoded
from bitwright.given.text import short

SHARDS = (".tar", ".parquet")
"""How the names of such files end."""
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")
"""Names of columns, the first that is there counts."""
MOST_DIGITS = 18
GROUPS_KEPT = 2
"""Row groups of Parquet files that are held once read, so that images beside each other are read once."""


def open_shards(
    paths: Sequence[Path], extensions: frozenset[str], input_key: str | None = None, *, labels: bool = True
) -> tuple[Encoded, Tensor | None]:
    """The images in archives or tables, in the order they lie in, and their classes where all have one.

    Args:
        paths: all ``.tar`` or all ``.parquet``.
        extensions: of the members of a tar archive that are images. Their class is the number in the member of the same
            sample, its name up to the first dot, that ends in ``.cls``.
        input_key: the column of a table, or the ending of the members, where several hold images.
        labels: whether classes are looked at.

    Raises:
        DataError: a file cannot be read or holds no image, or Parquet is asked for without pyarrow.
    """
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise DataError(f"Expected files of one kind, found {' and '.join(sorted(kinds))} in {paths[0].parent}.")
    tables = kinds == {".parquet"}
    images, classes = _open_tables(paths, input_key) if tables else _open_tars(paths, extensions, input_key)
    return images, _all_known(classes, paths[0]) if labels else None


# ---------------------------------------------------------------------------------------------------- tar


class _Member(NamedTuple):
    archive: int
    start: int
    size: int


class TarMembers(Encoded):
    """Image members of uncompressed tar archives, named ``archive.tar/member``."""

    def __init__(self, paths: Sequence[Path], names: list[str], members: list[_Member]) -> None:
        self._paths, self.names, self._members = list(paths), names, members

    def where(self, index: int) -> str:
        """Return the archive's path and the member's name."""
        return f"{self.names[index]} of {self._paths[self._members[index].archive].parent}"

    def opened(self, index: int) -> BinaryIO:
        """Return the member's bytes."""
        archive, start, size = self._members[index]
        with self._paths[archive].open("rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))


def _open_tars(
    paths: Sequence[Path], extensions: frozenset[str], ending: str | None
) -> tuple[TarMembers, list[int | None]]:
    names, members = [], []
    labels: list[int | None] = []
    for k, path in enumerate(paths):
        classes: dict[str, int | None] = {}
        samples: dict[str, str] = {}
        for member, text in _members(path):
            sample, kind = _sample(member.name)
            if kind == ending or (ending is None and f".{kind.rpartition('.')[2]}" in extensions):
                if sample in samples:
                    raise DataError(
                        f"Expected one image in each sample of {path}, found {samples[sample]} and {member.name}. Pack "
                        f"pictures alone, or name their ending, as in input_key='{kind}'."
                    )
                samples[sample] = member.name
                names.append(f"{path.name}/{member.name}")
                members.append(_Member(k, member.offset_data, member.size))
            elif text is not None:
                classes[sample] = _class(text)
        labels += [classes.get(sample) for sample in samples]
    if not names:
        raise DataError(
            f"Expected members that end in .{ending} in {paths[0]}, found none. Give the whole ending as input_key=, "
            "such as 'rgb.png'."
            if ending
            else f"Expected images in {paths[0]}, found none. Members end in {', '.join(sorted(extensions))}."
        )
    return TarMembers(paths, names, members), labels


def _sample(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and the ending that says what it is of it.

    Example:
        >>> _sample("train/0001.seg.PNG")
        ('train/0001', 'seg.png')
    """
    folder, slash, file = name.rpartition("/")
    sample, _, kind = file.partition(".")
    return f"{folder}{slash}{sample}", kind.lower()


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every file in an archive, with its bytes where it tells a class."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                hidden = member.name.rpartition("/")[2].startswith(".")
                if not member.isreg() or member.sparse is not None or hidden:
                    continue
                text = archive.extractfile(member) if member.name.endswith(".cls") else None
                yield member, None if text is None else text.read(MOST_DIGITS + 2)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"Expected an uncompressed tar archive at {path}, cannot read it ({short(error)}). "
            "Unpack it, or pack it anew."
        ) from error


def _class(text: bytes) -> int | None:
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) <= MOST_DIGITS else None


def _all_known(labels: Sequence[int | None], path: Path) -> Tensor | None:
    """The classes, where every image has one; that some have none is said."""
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        warnings.warn(
            f"{len(labels) - len(known)} of {len(labels)} images in {path.parent} have no class index, so that none is "
            "used. Give labels=.",
            UserWarning,
            stacklevel=2,
        )
    return torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None


# ------------------------------------------------------------------------------------------------ Parquet


class _Row(NamedTuple):
    table: int
    group: int
    row: int


class ParquetRows(Encoded):
    """Rows of Parquet tables with encoded images in one column, named ``table.parquet/row``."""

    def __init__(self, paths: Sequence[Path], columns: list[str], names: list[str], rows: list[_Row]) -> None:
        self._paths, self._columns, self.names, self._rows = list(paths), columns, names, rows
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def where(self, index: int) -> str:
        """Return the table's path and the row's number."""
        return f"{self.names[index]} of {self._paths[self._rows[index].table].parent}"

    def opened(self, index: int) -> BinaryIO:
        """Return the bytes of a row's image.

        Raises:
            DataError: the row holds no bytes.
        """
        table, group, row = self._rows[index]
        with self._lock:
            value = self._group(table, group)[row].as_py()
        found = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(found, bytes):
            raise DataError(
                f"Expected bytes of an image in column {self._columns[table]!r} of {self.where(index)}, found "
                f"{type(found).__name__}. Pass skip_unreadable=True to leave such rows out."
            )
        return io.BytesIO(found)

    def _group(self, table: int, group: int) -> Any:
        """The column in one row group."""
        key = (table, group)
        if key not in self._groups:
            import pyarrow.parquet as pq

            with pq.ParquetFile(self._paths[table]) as file:
                self._groups[key] = (
                    file.read_row_group(group, columns=[self._columns[table]]).column(0).combine_chunks()
                )
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


class _Found(NamedTuple):
    """What a table says of itself: where its images are, how many rows each group has, the class of each row."""

    column: str
    sizes: list[int]
    labels: list[int | None]


def _open_tables(paths: Sequence[Path], column: str | None) -> tuple[ParquetRows, list[int | None]]:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"Expected pyarrow to read {paths[0]}, found none. Install it with: pip install 'bitwright[parquet]'"
        ) from error
    found = [_look_into(path, column) for path in paths]
    names, rows = [], []
    for k, (path, table) in enumerate(zip(paths, found, strict=True)):
        places = [_Row(k, group, row) for group, size in enumerate(table.sizes) for row in range(size)]
        rows += places
        names += [f"{path.name}/{i}" for i in range(len(places))]
    if not rows:
        raise DataError(f"Expected images in {paths[0]}, found no row. Write it again, or give another table.")
    return ParquetRows(paths, [t.column for t in found], names, rows), [x for t in found for x in t.labels]


def _look_into(path: Path, asked: str | None) -> _Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            column = _column(IMAGE_COLUMNS if asked is None else (asked,), fields, _holds_images)
            label = _column(LABEL_COLUMNS, fields, pa.types.is_integer)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            known = file.read(columns=[label]).column(0).to_pylist() if label else [None] * sum(sizes)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"Expected a Parquet table at {path}, cannot read it ({short(error)}). Write or copy it again."
        ) from error
    if not column:
        raise DataError(
            f"Expected a column {asked or IMAGE_COLUMNS[0]!r} of encoded images in {path}, found "
            f"{', '.join(fields) or 'no column'}. Name the one that holds them, as input_key= or in the file."
        )
    return _Found(column, sizes, [value if value is not None and value >= 0 else None for value in known])


def _column(usual: Sequence[str], fields: Mapping[str, Any], fits: Callable[[Any], bool]) -> str:
    """The first of the usual columns whose type fits; nothing where there is none."""
    return next((name for name in usual if name in fields and fits(fields[name])), "")


def _holds_images(kind: Any) -> bool:
    """Whether a column may hold encoded images: bytes, or a structure with bytes as Hugging Face writes it."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
