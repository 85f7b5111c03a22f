"""Pictures of fits: their formats, and names that are not read as formulas."""

import matplotlib
import pytest

from experiments.mixed import pictures
from tests.mixed import designs


@pytest.fixture(scope="module")
def model():
  return designs.model_with_odd_names()


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
