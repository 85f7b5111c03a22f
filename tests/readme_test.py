"""The Python examples of the documents run as written and print what they show.

The documents are README.md, CONTRIBUTING.md and docs/. The blocks of one page run in order, in one
namespace and in an empty folder. A plain ``` block right after a Python block holds the expected
output. A block that cannot run is fenced as ```python no-run, after a comment that gives the
reason: <!-- not run: ... -->. A block after <!-- needs: NAME --> runs if the package NAME is
installed.
"""

import importlib.util
import pathlib
import re
import textwrap
from typing import NamedTuple

import absl.logging
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).absolute().parents[1]
_FENCE = re.compile(r"^ *```(.*?)\n(.*?)^ *```$", re.S | re.M)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


class Block(NamedTuple):
  """A Python block of a page."""

  code: str
  output: str | None  # what it is shown to print; None: nothing is shown
  line: int  # of its first statement
  runs: bool
  before: str  # the line above its fence


def blocks_of(text: str) -> list[Block]:
  """The Python blocks of a page, in order."""
  fences = list(_FENCE.finditer(text))
  found = []
  for i, fence in enumerate(fences):
    if fence[1].split()[:1] != ["python"]:
      continue
    output = None
    if i + 1 < len(fences):
      after = fences[i + 1]
      if not after[1] and not text[fence.end() : after.start()].strip():
        output = after[2]
    above = text[: fence.start()].splitlines()
    line, runs = len(above) + 2, fence[1] == "python"
    found.append(
      Block(textwrap.dedent(fence[2]), output, line, runs, above[-1].strip() if above else "")
    )
  return found


def check_output(printed: str, shown: str) -> None:
  """Equal words; decimals to a percent or their last digit, as another machine rounds otherwise."""
  words, wanted = printed.split(), shown.split()
  bare = lambda words: [_NUMBER.sub("0", word) for word in words]
  assert bare(words) == bare(wanted)
  numbers = lambda words: [n[0] for word in words for n in _NUMBER.finditer(word)]
  for one, other in zip(numbers(words), numbers(wanted), strict=True):
    decimals = len(other.partition(".")[2].partition("e")[0])
    last = 1.01 * 10.0**-decimals if decimals else 0.0
    np.testing.assert_allclose(float(one), float(other), rtol=0.01, atol=last)


def pages() -> list[pathlib.Path]:
  """Pages with Python blocks."""
  every = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
  return [path for path in every if blocks_of(path.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def verbosity():
  """Blocks may change what absl shows; the tests after them must not notice."""
  before = absl.logging.get_verbosity()
  yield
  absl.logging.set_verbosity(before)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_examples_run_and_print_what_is_shown(path, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": path.stem}
  for block in blocks_of(path.read_text(encoding="utf-8")):
    if not block.runs:
      assert re.fullmatch(r"<!-- not run: .+ -->", block.before), f"{path}:{block.line}: why?"
      continue
    needs = re.fullmatch(r"<!-- needs: (\w+) -->", block.before)
    if needs and importlib.util.find_spec(needs[1]) is None:
      continue
    capsys.readouterr()
    # Line numbers in a traceback are those of the page.
    exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
    if block.output is not None:
      check_output(capsys.readouterr().out, block.output)


def test_the_first_example_of_the_readme_shows_its_output():
  assert blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))[0].output


def test_blocks_are_found_with_their_lines_and_outputs():
  text = "# T\n\n```python\na\n```\n\n```\n1\n```\n\n"
  text += "- x\n  <!-- not run: b -->\n  ```python no-run\n  c\n    d\n  ```\n"
  assert blocks_of(text) == [
    Block("a\n", "1\n", 4, True, ""),
    Block("c\n  d\n", None, 14, False, "<!-- not run: b -->"),
  ]


@pytest.mark.parametrize("printed", ("a 1.03 7", "a 1.00 8", "a 7", "b 1.00 7"))
def test_another_output_is_an_error(printed):
  check_output("a 1.01 7", "a 1.00 7")
  with pytest.raises(AssertionError):
    check_output(printed, "a 1.00 7")
