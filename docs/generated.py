"""The pages of the site that are written by the code they describe: commands, settings of recipes, Python.

MkDocs runs :func:`on_files`; each page is a function that returns Markdown.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to the site."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def commands() -> str:
    """Every command with its arguments and options, as the command line declares them."""
    from typer.main import get_command

    from bitwright.cli import app

    group: Any = get_command(app)
    parts = [
        "# Commands",
        "Every command takes `--help`. Exit codes: 0 done, 1 failed, 2 the call was wrong, 130 interrupted.",
    ]
    for name, command in group.commands.items():
        if command.hidden:
            continue
        parts += [f"## bitwright {name}", _prose(command.help or ""), "\n".join(_options(command))]
    return "\n\n".join(p for p in parts if p) + "\n"


def _options(command: Any) -> Iterator[str]:
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    if not shown:
        return
    yield "| | | default |"
    yield "|---|---|---|"
    for parameter in shown:
        flag = parameter.param_type_name == "option"
        names = (
            ", ".join(f"`{n}`" for n in parameter.opts) if flag else f"`{parameter.metavar or parameter.name.upper()}`"
        )
        default = parameter.default
        plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
        yield f"| {names} | {_cell(getattr(parameter, 'help', '') or '')} | {f'`{default}`' if plain else ''} |"


def settings() -> str:
    """Every stage of a recipe with its settings, from the classes that check them."""
    from bitwright.recipes import builtin_recipes
    from bitwright.stages.base import Stage

    builtin_recipes()  # loads every stage
    parts = [
        "# Settings of recipes",
        "What a stage in a recipe's YAML may say; `bitwright recipes NAME` prints a recipe to start from. "
        "A setting that is not known, or out of range, is refused with its name.",
    ]
    for kind, stage in sorted(Stage.registry.items()):
        parts += [f"## {kind}", _prose(inspect.getdoc(stage) or ""), *_fields(stage)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _fields(model: Any) -> Iterator[str]:
    rows = ["| setting | values | default | |", "|---|---|---|---|"]
    nested, said = {}, _said(model)
    for name, field in model.model_fields.items():
        limits = ", ".join(str(m) for m in field.metadata)
        values = _type(field.annotation) + (f"; {limits}" if limits else "")
        rows.append(
            f"| `{name}` | {_cell(values)} | `{_cell(_short(field.get_default(call_default_factory=True)))}` | "
            f"{_cell(_prose(said.get(name, '')))} |"
        )
        inner = field.get_default(call_default_factory=True)
        if hasattr(type(inner), "model_fields"):
            nested[type(inner).__name__] = type(inner)
    yield "\n".join(rows)
    for title, inner in nested.items():
        yield f"### {title}"
        yield _prose(inspect.getdoc(inner) or "")
        yield from _fields(inner)


def _said(model: Any) -> dict[str, str]:
    """The text below each setting in the class, and in those that it inherits from."""
    found = {}
    for each in reversed([c for c in model.__mro__ if c.__module__.startswith("bitwright")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body  # type: ignore[attr-defined]
        for setting, below in pairwise(body):
            if isinstance(setting, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[setting.target.id] = inspect.cleandoc(ast.literal_eval(below.value))  # type: ignore[union-attr]
    return found


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if inspect.isclass(annotation) else str(annotation)
    return re.sub(r"(typing|bitwright(\.\w+)*)\.", "", text or str(annotation)).replace("NoneType", "None")


def _short(value: Any) -> str:
    return type(value).__name__ if hasattr(type(value), "model_fields") else repr(value)


def python() -> str:
    """What ``import bitwright`` offers, as mkdocstrings reads it from the code."""
    import bitwright

    parts = ["# Python", "`import bitwright as bw`. The command line is these functions with the same names."]
    for name in bitwright.__all__:
        if callable(getattr(bitwright, name)):
            parts.append(f"::: bitwright.{name}")
        if name == "QuantizedModel":
            parts += [_method(name, job) for job in ("save", "export")]
    return "\n\n".join(parts) + "\n"


def _method(owner: str, name: str) -> str:
    """A method that stands where the rest of its job does."""
    return f"::: bitwright.run.job.{name}\n    options:\n      heading: {owner}.{name}\n      heading_level: 3"


def on_page_content(html: str, **_: Any) -> str:
    """Takes the roles of docstrings (``:func:``) off, whose names stand behind them."""
    return re.sub(r":\w+:<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)


def _prose(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text).strip()


def _cell(text: str) -> str:
    """In one line, for a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


PAGES: dict[str, Callable[[], str]] = {"commands": commands, "settings": settings, "python": python}
