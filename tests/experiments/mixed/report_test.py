"""Pictures of fits: their format, and names shown as they are."""

import matplotlib
import numpy as np
import pytest

from experiments.mixed import model, report, table
from experiments.mixed.formula import INTERCEPT, parse

FORMULA = parse("y ~ x + (1 | g)")
NONE = (float("nan"), float("nan"))
FIT = model.Fit(
  {INTERCEPT: 1.0, "x": 2.0}, {}, {INTERCEPT: 0.5}, {INTERCEPT: NONE}, 0.3, NONE, 0.0, 0.0, (), (),
  True, 0.0,
)  # fmt: skip


def plot(tmp_path, name, groups=("a", "b", "c")):
  columns = {"y": ["1", "2", "3"], "x": ["0", "1", "5"], "g": list(groups)}
  data = table.grouped(columns, FORMULA, "gaussian")
  effects = {INTERCEPT: (np.arange(3.0), np.full(3, 0.1))}
  report.plot(tmp_path / name, FIT, FORMULA, data, effects, {INTERCEPT: np.arange(3.0)})
  return (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
  "name, head", (("x.png", b"\x89PNG"), ("x.PDF", b"%PDF-"), ("x.svg", b"<?xml"))
)
def test_the_name_asks_for_the_format(tmp_path, name, head):
  assert plot(tmp_path, name).startswith(head)


def test_names_are_shown_as_they_are(tmp_path):
  names = ("$5", "a_b$", r"$\frac$")  # two of them would be formulas, one of them a wrong one
  with matplotlib.rc_context({"svg.fonttype": "none"}):
    shown = plot(tmp_path, "x.svg", names).decode()
  for name in names:
    assert f">{name}</text>" in shown, name
