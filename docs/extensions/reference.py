"""Write the pages of the reference: one for each group of names in `shrinkmeta.__all__`.

The groups and their titles are the comments inside `__all__`. The pages hold autodoc directives, so
that all text comes from the docstrings. They lie in docs/reference/, which git ignores.
"""

import ast
import inspect
import operator
import pathlib
import re
import textwrap
from typing import Any

from docstrings import to_rst
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

import shrinkmeta as sm
from shrinkmeta import public

ROOT = pathlib.Path(__file__).absolute().parents[2]
FOLDER = ROOT / "docs" / "reference"
ROOMS = {"Mixed models": "mixed"}  # public rooms besides `__all__`
LEARNER = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})


def groups_of(source: str) -> dict[str, list[str]]:
  """Return {title: names} of `__all__`; a title is the comment above its names.

  Args:
    source: the text of shrinkmeta/__init__.py.

  Raises:
    ValueError: a name stands before the first comment.
  """
  inside = source.partition("__all__ = (")[2].partition("\n)")[0]
  groups: dict[str, list[str]] = {}
  title = ""
  for line in inside.splitlines():
    if comment := re.match(r"\s*# (.+?)\.?$", line):
      title = comment[1]
      groups[title] = []
    elif names := re.findall(r'"(\w+)"', line):
      if not title:
        raise ValueError(f"{names[0]} in __all__ stands above the first comment; move it below one")
      groups[title] += names
  return groups


def slug_of(title: str) -> str:
  """The file name of a group, from its first words."""
  words = re.split("[:,]", title.lower())[0]
  return "_".join(word for word in re.findall(r"\w+", words) if word not in ("the", "of", "and"))


def names_of(module: Any) -> list[str]:
  """The public names of a module: its `__all__`, or else the functions and classes it defines."""
  own = lambda value: (getattr(value, "__module__", None) or "").startswith(module.__name__)
  names = [n for n, v in vars(module).items() if not n.startswith("_") and own(v)]
  return list(getattr(module, "__all__", names))


def _is_class(value: Any) -> bool:
  """Whether a value is a class, and not a type such as dict[str, Any], or Any itself."""
  return inspect.isclass(value) and value is not Any and not hasattr(value, "__origin__")


def summary_of(name: str) -> str:
  """The first paragraph about a public name, which is its first sentence for a function."""
  return " ".join(to_rst([" ".join(text_of(name).partition("\n\n")[0].split())]))


def text_of(name: str) -> str:
  """The docstring of a public name, such as fit or lora.init.

  For a constant or a type it is the comment at its assignment, or the type as it is written, or
  else the docstring of the file.
  """
  value = operator.attrgetter(name)(sm)
  if inspect.isfunction(value) or inspect.ismodule(value) or _is_class(value):
    return inspect.getdoc(value) or ""
  room, _, last = name.rpartition(".")
  module = operator.attrgetter(room)(sm) if room else public
  imports = [x for x in ast.parse(_source(module.__name__)).body if isinstance(x, ast.ImportFrom)]
  home = next((x.module for x in imports if last in {alias.name for alias in x.names}), None)
  source = _source(home or module.__name__)
  line = next(line for line in source.splitlines() if re.match(rf"{last}\b.*=", line))
  written, _, comment = line.partition("#")
  literal = re.search(r"= (Literal\[.*\])", written)
  return comment.strip() or (
    f"`{literal[1]}`" if literal else ast.get_docstring(ast.parse(source)) or ""
  )


def _source(module: str) -> str:
  """The text of a module of the library."""
  path = ROOT / module.replace(".", "/")
  path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
  return path.read_text(encoding="utf-8")


def shown(name: str) -> str:
  """A public name as users write it: sm.fit, and mixed.fit of `from shrinkmeta import mixed`."""
  return name if name.partition(".")[0] in ROOMS.values() else f"sm.{name}"


def directive(name: str, path: str | None = None) -> str:
  """The autodoc directive of a public name."""
  path = path or f"shrinkmeta.{name}"
  value: Any = operator.attrgetter(path.partition(".")[2])(sm)
  if inspect.ismodule(value):
    names = [f"{name}.{n}" for n in names_of(value)]
    inner = [directive(n, f"shrinkmeta.{n}") for n in names]
    text = "\n".join(to_rst(inspect.cleandoc(value.__doc__ or "").splitlines()))
    title = shown(name)
    heading = f"{title}\n{'-' * len(title)}\n\n.. py:module:: {path}"
    return "\n\n".join([heading, text, "\n".join(table_of(names)), *inner])
  if _is_class(value):
    members = f"\n   :members: {', '.join(own)}" if (own := methods_of(value)) else ""
    text = f".. autoclass:: {path}{members}"
    if value is sm.MetaLearner:
      text += "\n\n" + textwrap.indent("\n\n".join(learner_functions()), "   ")
    return text
  if inspect.isfunction(value):
    return f".. autofunction:: {path}"
  text = "\n".join(to_rst(text_of(name).splitlines()))
  module, _, last = path.rpartition(".")
  return f".. py:data:: {last}\n   :module: {module}\n\n" + textwrap.indent(text, "   ")


def methods_of(cls: type) -> list[str]:
  """The public methods and properties that a class of the library defines itself."""
  found = []
  for name, raw in vars(cls).items():
    plain = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    own = plain.fget if isinstance(plain, property) else plain
    here = getattr(own, "__module__", "").startswith("shrinkmeta")
    if not name.startswith("_") and here and inspect.isfunction(own):
      found.append(name)
  return found


def learner_functions() -> list[str]:
  """The functions that a learner holds, as methods of MetaLearner with their own docstrings."""
  found = []
  for name in LEARNER._fields:
    function = getattr(LEARNER, name)
    if inspect.ismethod(function):
      bare = [
        x.replace(annotation=x.empty) for x in inspect.signature(function).parameters.values()
      ]
      lines = to_rst(inspect.cleandoc(function.__doc__ or "").splitlines())
      body = textwrap.indent(str(GoogleDocstring(lines)), "   ")
      found.append(f".. py:method:: {name}{inspect.Signature(bare)}\n   :no-index-entry:\n\n{body}")
  return found


def page_of(title: str, names: list[str]) -> str:
  """The page of a group: a table of its names, then each with its docstring."""
  parts = [title, "=" * len(title), "", *table_of(names), ""]
  parts += [f"{directive(name)}\n" for name in names]
  return "\n".join(parts) + "\n"


def table_of(names: list[str]) -> list[str]:
  """A table of names and their first sentences."""
  lines = [".. list-table::", "   :widths: 30 70", ""]
  for name in names:
    lines += [f"   * - {link_to(name)}", f"     - {summary_of(name)}"]
  return lines


def link_to(name: str) -> str:
  """A link to the entry of a public name."""
  return f":py:obj:`{shown(name)} <shrinkmeta.{name}>`"


def write_pages(app: Sphinx) -> None:
  """Write the pages that have changed, so that a second build reads those only."""
  groups = groups_of(_source("shrinkmeta"))
  groups |= {title: [room] for title, room in ROOMS.items()}
  pages = {slug_of(title): page_of(title, names) for title, names in groups.items()}
  index = [
    "Reference",
    "=========",
    "",
    "Every public name, as ``import shrinkmeta as sm`` gives it. Mixed models are a room of their",
    "own: ``from shrinkmeta import mixed``.",
    "",
    ".. toctree::",
    "   :hidden:",
    "",
    *(f"   {slug_of(title)}" for title in groups),
    "",
  ]
  for title, names in groups.items():
    index += [f":doc:`{title} <{slug_of(title)}>`", "-" * (len(title) * 2 + 12), ""]
    index += [*table_of(names), ""]
  pages["index"] = "\n".join(index)
  FOLDER.mkdir(exist_ok=True)
  for path in FOLDER.glob("*.rst"):
    if path.stem not in pages:
      path.unlink()
  for slug, text in pages.items():
    path = FOLDER / f"{slug}.rst"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      path.write_text(text, encoding="utf-8")


def read_docstring(
  app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
  """Make a docstring readable for napoleon, which runs after this."""
  lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
  """Connect to Sphinx."""
  app.setup_extension("sphinx.ext.autodoc")
  app.connect("builder-inited", write_pages)
  app.connect("autodoc-process-docstring", read_docstring, priority=400)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
