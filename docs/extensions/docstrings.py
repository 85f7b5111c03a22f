"""Docstrings of the library as reStructuredText that Sphinx's napoleon extension can read.

The docstrings are written for people who read the code: formulas are indented text, and a vertical
bar or an asterisk stands for itself. reStructuredText would read these as its own marks. The path
of a page, such as docs/hazards.md#line-search, becomes a link to that page.
"""

import pathlib
import re

_TITLE = re.compile(r"[A-Z]\w+:$")
_KEPT = re.compile(r"(`[^`]+`|docs/\w+\.md(?:#[\w-]+)?)")
_PAGE = re.compile(r"(docs/(\w+)\.md)(?:#([\w-]+))?")
_ROOT = pathlib.Path(__file__).absolute().parents[2]


def to_rst(lines: list[str]) -> list[str]:
  """Return the lines of a docstring as reStructuredText with Google's sections.

  Args:
    lines: the docstring without its common indentation.

  Returns:
    the lines in which indented formulas are literal blocks, special characters of the prose are
    escaped, and a heading stands above the first example.
  """
  found: list[str] = []
  blank, in_text, example, n = True, True, False, 0
  while n < len(lines):
    line = lines[n]
    indent = len(line) - len(line.lstrip())
    if _TITLE.match(line):
      in_text, example = False, example or line == "Example:"
    elif line and not indent:
      in_text = True
    if line.lstrip().startswith(">>>"):
      if not example and not indent:
        found += [".. rubric:: Example", ""]
        example = True
      while n < len(lines) and lines[n].strip():
        found.append(lines[n])
        n += 1
      blank = False
      continue
    if in_text and blank and (indent or line.startswith("|")):  # a formula or a table
      block = _block(lines[n:], bool(indent))
      found += ["::", "", *("  " + x for x in block), ""]
      n += len(block)
      continue
    if line.startswith("References:"):
      found.append("**References.** " + escaped(line.removeprefix("References:").strip()))
      while n + 1 < len(lines) and lines[n + 1].strip():
        n += 1
        found.append(escaped(lines[n].strip()))
    else:
      found.append(escaped(line))
    blank, n = not line.strip(), n + 1
  return found


def _block(lines: list[str], indented: bool) -> list[str]:
  """The lines up to the next blank one or, if `indented`, up to the next that is not indented."""
  ends = lambda x: bool(x) and not x[0].isspace() if indented else not x.strip()
  end = next((i for i, x in enumerate(lines) if ends(x)), len(lines))
  while not lines[end - 1].strip():
    end -= 1
  return lines[:end]


def escaped(line: str) -> str:
  """Escape what reStructuredText would read as a mark, outside of `code` and **bold**.

  The path of a page of docs/ becomes a link, as seen from the folder docs/reference/.
  """
  parts = _KEPT.split(line)
  for n in range(0, len(parts), 2):
    text = parts[n].replace("\\", "\\\\").replace("|", r"\|")
    text = re.sub(r"(?<!\*)\*(?!\*)", r"\*", text)
    text = re.sub(r"\*\*(?=[\w,: ]+:)(?!.*\*\*)", r"\*\*", text)  # **kwargs: of a list of arguments
    parts[n] = re.sub(r"(?<=\w)_(?!\w)", r"\_", text)
  for n in range(1, len(parts), 2):
    if page := _PAGE.fullmatch(parts[n]):
      file, name, anchor = page.groups()
      if not (_ROOT / file).exists():
        raise ValueError(f"A docstring names {file}, which does not exist: {line.strip()}")
      title = (_ROOT / file).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
      text, end = (f"{title}: {anchor}", f"#{anchor}") if anchor else (title, "")
      parts[n] = f"`{text} <../{name}.html{end}>`__"
  return "".join(parts)
