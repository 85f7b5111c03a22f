"""The site of the documents and the text of the wheel: docstrings, links, README.md.

`.ci/run` builds the whole site. These tests check the parts that need no Sphinx.
"""

import importlib.util
import pathlib
import re
import types

import pytest

ROOT = pathlib.Path(__file__).absolute().parents[1]


def module_of(path: str) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


DOCSTRINGS, CHECK = module_of("docs/extensions/docstrings.py"), module_of("docs/check_site.py")
SETUP = module_of("setup.py")


def test_formulas_and_tables_are_literal_blocks():
  text = ["Build it.", "", "    K w = s * g |z|", "    more", "", "Then text.", "", "| a | b |", ""]
  assert DOCSTRINGS.to_rst(text) == [
    *("Build it.", "", "::", "", "      K w = s * g |z|", "      more", "", ""),
    *("Then text.", "", "::", "", "  | a | b |", "", ""),
  ]


def test_arguments_stay_and_examples_get_a_heading():
  text = ["Do.", "", "Args:", "  x: a_ |x| number,", "    of `a_` kind.", "", ">>> f(1) | 2", "3"]
  assert DOCSTRINGS.to_rst(text) == [
    *("Do.", "", "Args:", r"  x: a\_ \|x\| number,", "    of `a_` kind.", ""),
    *(".. rubric:: Example", "", ">>> f(1) | 2", "3"),
  ]


def test_references_are_one_paragraph():
  found = DOCSTRINGS.to_rst(["References: A, a title,", "    1999; B.", "", "End."])
  assert found == ["**References.** A, a title,", "1999; B.", "", "End."]


@pytest.mark.parametrize(
  "line,wanted",
  (
    ("sigma_m^2 and sigma_", r"sigma_m^2 and sigma\_"),
    ("a * b", r"a \* b"),
    ("**bold** `a|b`", "**bold** `a|b`"),
    ("  **options: of jit", r"  \*\*options: of jit"),
    (r"a \ b", r"a \\ b"),
    ("docs/mixed.md lists a_.", r"`Mixed models <../mixed.html>`__ lists a\_."),
    ("(docs/hazards.md#x-y)", "(`Hazards: x-y <../hazards.html#x-y>`__)"),
  ),
)
def test_marks_are_escaped(line, wanted):
  assert DOCSTRINGS.escaped(line) == wanted


def test_the_text_of_the_wheel_has_no_link_into_the_repository():
  text = "<!-- a -->\n# T\n\n![p](a/b.png)\n\n[x](docs/x.md#y) [z](https://z.org)\n[`f`](f.py)\n"
  assert SETUP.long_description(text) == "# T\n\nx [z](https://z.org)\n`f`\n"
  whole = SETUP.long_description((ROOT / "README.md").read_text(encoding="utf-8"))
  assert "](https://arxiv.org" in whole and "```python" in whole
  assert not [target for target in re.findall(r"\]\(([^)]*)\)", whole) if ":" not in target]


def site(folder, links):
  (folder / "a").mkdir()
  anchors = '<h1 id="here"></h1><a name="old"></a>'
  (folder / "a" / "b.html").write_text(f"<html>{anchors}{links}</html>")
  (folder / "index.html").write_text('<a href="a/b.html#here">b</a>')
  (folder / "x.png").write_bytes(b"")
  return CHECK.check(folder)


@pytest.mark.parametrize(
  "link,dead",
  (
    ('<a href="../index.html">', None),
    ('<a href="#here"><a href="b.html#old">', None),
    ('<img src="../x.png">', None),
    ('<a href="none.html">', "no such file"),
    ('<img src="none.png">', "no such file"),
    ('<a href="#nowhere">', "no such anchor"),
    ('<a href="../../etc">', "no such file"),
  ),
)
def test_a_dead_link_of_the_site_is_found(tmp_path, link, dead):
  found, outside = site(tmp_path, link + '<a href="https://example.org/">')
  assert outside == {"https://example.org/"}
  assert found == [] if dead is None else dead in found[0]


def test_links_to_public_names_lead_to_the_reference():
  for name in ("sphinx", "pygments"):
    pytest.importorskip(name)
  sources = module_of("docs/extensions/sources.py")
  assert sources.entry_of("shrinkmeta/training/fit.py", "fit") == "shrinkmeta.fit"
  file = "shrinkmeta/learner/learner.py"
  assert sources.entry_of(file, "init") == "shrinkmeta.MetaLearner.init"
  assert sources.entry_of(file, "learner_of") is None
  assert sources.entry_of("shrinkmeta/mode/warm_start.py", "no_start") is None  # another function
  assert "shrinkmeta.MetaLearner.update" in sources.public_names(file)
  file = "shrinkmeta/plots/mixed_models/draw.py"
  assert sources.public_names(file) == ["shrinkmeta.plots.mixed_model"]
  assert sources.entry_of(file, "mixed_model") == "shrinkmeta.plots.mixed_model"
  assert sources.entry_of("shrinkmeta/curvature/one_by_one.py", "one_by_one") is None  # of sm.lora
