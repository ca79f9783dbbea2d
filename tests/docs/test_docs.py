"""The documentation says what the code does."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from benchmarks import picture
from bitwright import __version__
from bitwright.cli import app
from bitwright.recipes import builtin_recipes
from bitwright.stages.base import Stage

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(DOCS.rglob("*.md"))]


def generated() -> Any:
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(node: ast.expr) -> str:
    """A string as it stands in the source, with dots for what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages() -> list[str]:
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith("Error"):
                    found.append(text_of(node.args[0]))
    return found


def commands() -> list[list[str]]:
    """Every call of bitwright in a code block that can be looked at."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").strip()
                if line.startswith("bitwright "):
                    found.append(shlex.split(line, comments=True)[1:])
    return found


def test_every_error_of_the_questions_page_is_one_that_the_code_raises() -> None:
    known = messages()
    asked = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
    assert len(asked) > 10
    for error in asked:
        pattern = ".*".join(re.escape(part) for part in error.split("…"))
        assert any(re.search(pattern, message, flags=re.DOTALL) for message in known), error


def test_every_command_and_option_in_the_documentation_exists() -> None:
    group: Any = get_command(app)
    seen = commands()
    assert len(seen) > 15
    for words in seen:
        if words[0].startswith("-"):
            continue
        assert words[0] in group.commands, words
        known = {name for p in group.commands[words[0]].params for name in p.opts} | {"--help", "-h"}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, " ".join(words)


def test_links_between_pages_lead_somewhere() -> None:
    made = {f"reference/{name}.md" for name in generated().PAGES}
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#: ]*)(?:#([^)]*))?\)", page.read_text()):
            if target in made:
                continue
            place = page.parent / target if target else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(place), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_reference_names_every_option_and_setting() -> None:
    pages = generated()
    group: Any = get_command(app)
    text = pages.commands()
    for name, command in group.commands.items():
        section = text.split(f"## bitwright {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help" and not parameter.hidden:
                assert f"`{parameter.opts[0]}`" in section
    builtin_recipes()
    text = pages.settings()
    for kind, stage in Stage.registry.items():
        section = text.split(f"## {kind}\n")[1].split("\n## ")[0]
        for field in stage.model_fields:
            assert f"`{field}`" in section
    assert "What is optimised at once." in text  # what stands below a field says what it does
    assert "relative to the recipe's other stages" in text  # in the class that has it first
    shown = re.findall(r"^::: bitwright\.([\w.]+)", pages.python(), flags=re.MULTILINE)
    assert {"quantize", "load", "QuantizedModel", "run.job.save"} <= set(shown)


def test_every_page_is_in_the_site_map() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(site["nav"])))
    assert {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} <= listed


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("material", "mkdocstrings")):
        pytest.skip("what makes the site is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site" / "reference" / "commands.html").is_file()
    shutil.rmtree(tmp_path / "site")


def test_the_picture_of_the_first_page_is_that_of_the_figures() -> None:
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.svg()
    shown = {point.words: point.share for point in picture.points()}
    assert all(0.5 < share < 1 for share in shown.values())
    assert len(list(picture.points())) == 9


def test_what_is_cited_and_what_changed_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == __version__
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
