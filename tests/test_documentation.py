"""README.md and docs/: short enough, complete, and without links that lead nowhere."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import opero
import opero.concurrency
import opero.core
import opero.events
import opero.exceptions
import opero.testing
from opero.core.control import OPERO_DEFAULTS
from opero.decorators.opmap import OPMAP_DEFAULTS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


def test_links_of_the_readme_work_on_pypi_too():
    assert re.findall(r"\]\((?!https://)[^)]*\)", README) == []


def test_what_the_readme_links_to_is_there():
    repository = PROJECT["urls"]["Source"] + "/blob/main/"
    linked = [link.removeprefix(repository) for link in re.findall(r"\]\((https://[^)]*)\)", README)]
    broken = []
    for link in linked:
        path, _, anchor = link.partition("#")
        if not (ROOT / path).is_file() or (anchor and anchor not in headings(ROOT / path)):
            broken.append(link)
    assert len(linked) > 20
    assert broken == []


@pytest.mark.parametrize("name", ["Changelog", "Documentation"])
def test_the_project_links_to_files_that_are_there(name):
    assert (ROOT / PROJECT["urls"][name].removeprefix(PROJECT["urls"]["Source"] + "/blob/main/")).is_file()


def test_each_page_stands_in_a_table_of_contents():
    listed = {
        (page.parent / f"{entry}.md").resolve()
        for page in DOCS.rglob("*.md")
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for entry in re.findall(r"^[\w/-]+$", tree, re.MULTILINE)
    }
    assert set(DOCS.rglob("*.md")) - listed == {DOCS / "index.md"}


def exported():
    for module in (opero, opero.core, opero.concurrency, opero.events, opero.exceptions, opero.testing):
        for name in module.__all__:
            if name != "__version__":
                yield name


@pytest.mark.parametrize("name", sorted(set(exported())))
def test_each_exported_name_is_in_the_reference(name):
    is_error = name in opero.exceptions.__all__ and "automodule:: opero.exceptions" in REFERENCE
    assert is_error or re.search(rf"(:: opero\.[\w.]*|[ ,]){name}\b", REFERENCE)


@pytest.mark.parametrize("name", sorted(OPMAP_DEFAULTS))
def test_each_option_is_in_the_docstring_that_the_reference_is_made_from(name):
    documented = inspect.getdoc(opero.opero if name in OPERO_DEFAULTS else opero.opmap)
    assert re.search(rf"^\s*- (``\w+``, )*``{name}``", documented, re.MULTILINE)


def test_each_package_that_opero_needs_is_listed_with_its_reason():
    page = (DOCS / "dependencies.md").read_text(encoding="utf-8")
    needed = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
    listed = re.findall(r"^\| ([\w-]+) \|", page.partition("Extras bring")[0], re.MULTILINE)
    assert sorted(set(listed) - {"package"}) == sorted(needed)
