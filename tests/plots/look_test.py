import subprocess
import sys

import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.choice.tables import CurvePoint, ModuleLoss
from shrinkmeta.plots import look
from tests.plots.drawn import check_texts


def test_the_library_imports_neither_matplotlib_nor_flax():
  """Each of them would cost every start a fifth of a second and more."""
  program = (
    "import sys, shrinkmeta as sm; sm.plots.sigma_by_module, sm.fit, sm.posterior; "
    "assert not {'matplotlib', 'flax'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


ROW = ModuleLoss("a", 0.1, 0.1, 1, 4, 1.0, 0.1, 1.0, 0.1)
POINT = CurvePoint(None, (), 1.0, 0.1, 0.0, 0, 0, 0.1)
EVALUATION = sm.Evaluation(np.ones(3), None, np.ones(3, bool))
CALLS = {
  "adaptation_curves": [{"maml": {1: EVALUATION}}],
  "choice_curve": [sm.Choice((), (ROW,), (POINT,), 2, 0, None)],
  "mixed_model": [None],
  "reliability_diagram": [np.log(np.ones((1, 2)) / 2), np.array([0])],
  "shrunk_estimates": [np.zeros(2), np.ones(2)],
  "sigma_by_module": [{"body": 0.1}],
  "sigma_history": [[{"sigma/body": 0.1}]],
  "sigma_picture": ["sigma.png"],
}


@pytest.mark.parametrize("name", sm.plots.__all__)
def test_without_matplotlib_the_error_names_the_extra(name, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"pip install 'shrinkmeta\[plots\]'"):
    getattr(sm.plots, name)(*CALLS[name])


def test_forty_lines_all_look_different():
  made = look.looks([str(i) for i in range(40)])
  assert len({(x.color, x.dashes) for x in made.values()}) == 40
  assert len({(x.color, x.marker) for x in made.values()}) == 40
  assert look.looks(["a", "b"], {"b": "red"})["b"].color == "red"


@pytest.mark.parametrize(
  "low,high", [(0.1, 0.2), (0.03, 8.0), (1e-4, 1e3), (1e-30, 1e18), (2, 2.1)]
)
def test_log_ticks_are_few_and_inside(low, high):
  ticks = look.log_ticks(low, high)
  assert 1 <= len(ticks) <= 14
  assert all(low <= t <= high for t in ticks) or len(ticks) == 1


def test_wrong_colours_are_refused():
  pytest.importorskip("matplotlib")
  with pytest.raises(ValueError, match="colors\\['a'\\] must be a colour"):
    sm.plots.sigma_by_module({"a": [{"body": 0.1}]}, colors={"a": "no colour"})


def test_overlapping_texts_are_found():
  pytest.importorskip("matplotlib")
  figure, (ax,) = look.figure(3.0)
  ax.text(0.5, 0.5, "first")
  check_texts(figure, "first")
  ax.text(0.51, 0.51, "second")
  with pytest.raises(AssertionError, match="'first' and 'second' overlap"):
    check_texts(figure)
  with pytest.raises(AssertionError, match="third is not written"):
    check_texts(figure, "third")
