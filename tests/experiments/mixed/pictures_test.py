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


@pytest.mark.parametrize("kind", ("groups", "shrinkage", "residuals", "quantiles", "all"))
def test_names_are_shown_as_they_are(tmp_path, model, kind):
  with matplotlib.rc_context({"svg.fonttype": "none"}):
    pictures.write(tmp_path / "x.svg", model, kind)
  shown = (tmp_path / "x.svg").read_text()
  wanted = {
    "groups": ("$5", "a_b$", r"$\frac$", "(Intercept)", "x", "$g$"),
    "shrinkage": ("(Intercept) by itself", "x by itself"),
    "residuals": ("fitted y$x$", "Pearson residual"),
    "quantiles": ("residuals", "(Intercept)", "x", "normal quantile"),
  }
  for name in wanted.get(kind, [name for names in wanted.values() for name in names]):
    assert f">{name}</text>" in shown, name


def test_the_figures_hold_the_estimates(model):
  figure = pictures.draw(model, "all")
  parts = figure.subfigs
  effects, own = mixed.effects(model), mixed.unshrunk(model)
  for ax, key in zip(parts[0].axes, effects, strict=True):
    order = np.argsort(-effects[key].value, kind="stable")
    found = [line.get_xdata() for line in ax.lines]
    for want in (own[key][order], effects[key].value[order]):
      assert any(np.array_equal(x, want) for x in found if len(x) == len(want))
  for ax, key in zip(parts[1].axes, effects, strict=True):
    points = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(points, np.stack([own[key], effects[key].value], 1))
  mean, residuals = mixed.residuals(model)
  dots = parts[2].axes[0].lines[1]
  np.testing.assert_allclose((dots.get_xdata(), dots.get_ydata()), (mean, residuals))
  line = parts[3].axes[0].lines[1]
  np.testing.assert_allclose(line.get_ydata(), np.sort(residuals))


@pytest.mark.parametrize("family", ("logistic", "poisson"))
def test_families_without_estimates_of_single_groups(family):
  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(8), 10)
  data = {"y": rng.integers(0, 2, 80), "g": g}
  model = mixed.fit("y ~ 1 + (1 | g)", data, family=family)
  figure = pictures.draw(model, "all")
  figure.canvas.draw()
  groups, shrinkage, *_ = (part.axes[0] for part in figure.subfigs)
  (offsets,) = [c.get_offsets() for c in shrinkage.collections]
  assert len(offsets) == 0  # a group alone has no estimate
  names = [text.get_text() for text in groups.get_legend().get_texts()]
  assert names == ["φ ± σ", "φ", "shrunk, 95 % interval"]
