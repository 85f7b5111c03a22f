"""Pictures of fits: their formats, and names that are not read as formulas."""

import matplotlib
import numpy as np
import pytest

from experiments.mixed import pictures
from shrinkmeta import mixed


@pytest.fixture(scope="module")
def model():
  rng = np.random.default_rng(0)
  names = ["$5", "a_b$", r"$\frac$", "d", "e", "f"]  # two would be formulas, one a wrong one
  g = np.repeat(np.arange(6), 5)
  x = rng.normal(size=30)
  y = rng.normal(size=6)[g] + (1 + rng.normal(size=6)[g]) * x + 0.5 * rng.normal(size=30)
  data = {"y$x$": y, "x": x, "$g$": [names[i] for i in g]}
  return mixed.fit("`y$x$` ~ x + (x || `$g$`)", data)


@pytest.mark.parametrize(
  "name, head",
  (("x.png", b"\x89PNG"), ("x.PDF", b"%PDF-"), ("x.svg", b"<?xml"), ("x.jpg", b"\xff\xd8")),
)
def test_the_name_asks_for_the_format(tmp_path, model, name, head):
  pictures.write(tmp_path / name, model, "groups")
  assert (tmp_path / name).read_bytes().startswith(head)
  assert "." + name[2:].lower() in pictures.SUFFIXES


def test_names_are_shown_as_they_are(tmp_path, model):
  with matplotlib.rc_context({"svg.fonttype": "none"}):
    pictures.write(tmp_path / "x.svg", model, "all")
  shown = (tmp_path / "x.svg").read_text()
  for name in ("$5", "a_b$", r"$\frac$", "$g$", "y$x$", "fitted y$x$", "x by itself", "residuals"):
    assert f">{name}</text>" in shown, name
