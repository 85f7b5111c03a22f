"""Give the README.md of a folder the pages of that folder as its children in the site's contents.

The files themselves hold ordinary links only, as GitHub shows no toctree.
"""

import fnmatch
import posixpath

from sphinx.application import Sphinx


def children_of(docname: str, pages: set[str]) -> list[str]:
  """The pages beside a README and the READMEs of the folders below it, nearest first.

  Args:
    docname: a page such as results/README.
    pages: the names of all pages.

  Returns:
    the names relative to the folder. A README below another README of the folder is left out.
  """
  folder = posixpath.dirname(docname)
  inside = [posixpath.relpath(page, folder) for page in pages if page.startswith(f"{folder}/")]
  found = []
  for page in sorted(inside, key=_order):
    above = posixpath.dirname(page)
    nested = any(above.startswith(posixpath.dirname(x) + "/") for x in found if "/" in x)
    if page != "README" and ("/" not in page or page.endswith("/README")) and not nested:
      found.append(page)
  return found


def _order(page: str) -> tuple[int, list[tuple[str, int]]]:
  """READMEs of few folders first; k2 before k10."""
  parts = page.replace("/", "_").split("_")
  number = lambda part: int("".join(c for c in part if c.isdigit()) or 0)
  return page.count("/"), [(part.rstrip("0123456789"), number(part)) for part in parts]


def add_children(app: Sphinx, docname: str, source: list[str]) -> None:
  """Append a hidden toctree to the README of a folder."""
  if docname.endswith("/README") and (children := children_of(docname, app.env.found_docs)):
    source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(children) + "\n```\n"


def drop_empty_patterns(app: Sphinx, docname: str, source: list[str]) -> None:
  """Drop the patterns of the first page, such as notebooks/*, that match no page of this tree."""
  if docname != app.config.root_doc:
    return
  folder = posixpath.dirname(docname)
  pages = [posixpath.relpath(page, folder) for page in app.env.found_docs]
  empty = lambda line: "*" in line and not fnmatch.filter(pages, line.strip())
  source[0] = "\n".join(line for line in source[0].splitlines() if not empty(line)) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
  """Connect to Sphinx."""
  app.connect("source-read", add_children)
  app.connect("source-read", drop_empty_patterns)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
