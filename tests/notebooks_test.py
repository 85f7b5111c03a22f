"""The notebooks in docs/notebooks/ are well formed and use public names only.

A notebook is a page of MyST markdown with ```{code-cell} blocks. The build of the site runs them.
"""

import ast
import pathlib
import re

import pytest

import shrinkmeta as sm
from tests.docs_links_test import links_of, problem_of

ROOT = pathlib.Path(__file__).absolute().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
PAGES = sorted(FOLDER.glob("*.md"))
NOTEBOOKS = [page for page in PAGES if page.name != "index.md"]
_CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.S | re.M)

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
  """The code of every cell; lines of magics become comments."""
  cells = _CELL.findall(path.read_text(encoding="utf-8"))
  return [re.sub(r"^%", "# %", cell, flags=re.M) for cell in cells]


def test_there_are_notebooks_and_the_index_lists_them():
  assert NOTEBOOKS
  index = (FOLDER / "index.md").read_text(encoding="utf-8")
  tree = re.search(r"```\{toctree\}\n.*?\n\n(.*?)```", index, re.S)
  assert tree and sorted(tree[1].split()) == sorted(path.stem for path in NOTEBOOKS)
  for path in NOTEBOOKS:
    assert f"({path.name})" in index, f"no link to {path.name}"


@by_name
def test_a_notebook_begins_with_its_kernel_a_title_and_how_to_install(path):
  text = path.read_text(encoding="utf-8")
  head, body = text.split("\n---\n", 1)
  assert head.startswith("---\njupytext:\n") and "format_name: myst" in head
  assert "kernelspec:" in head and "name: python3" in head
  assert len(re.findall(r"^# ", re.sub(_CELL, "", body), re.M)) == 1
  first = cells_of(path)[0]
  assert "%pip install" in first and not ast.parse(first).body, "the first cell is all comments"


@by_name
def test_a_notebook_uses_public_names(path):
  for cell in cells_of(path):
    for node in ast.walk(ast.parse(cell)):
      if isinstance(node, ast.ImportFrom):
        mixed = ast.unparse(node) == "from shrinkmeta import mixed"
        assert mixed or not (node.module or "").startswith("shrinkmeta"), ast.unparse(node)
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        assert not any(name.startswith("shrinkmeta.") for name in names), ast.unparse(node)
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "sm":
          assert node.attr in sm.__all__, f"sm.{node.attr} is not public"
        assert not node.attr.startswith("_"), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_notebooks_resolve(page):
  links = links_of(page.read_text(encoding="utf-8"))
  assert not list(filter(None, (problem_of(page, *link) for link in links)))
