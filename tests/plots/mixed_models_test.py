"""Pictures of mixed models: what they draw, and the words on them."""

import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta import mixed
from tests.mixed import designs
from tests.plots.drawn import check_texts

pytest.importorskip("matplotlib")
KINDS = ("groups", "lines", "shrinkage", "residuals", "quantiles")


@pytest.fixture(scope="module")
def model():
  return designs.model_with_odd_names()


def test_the_pictures_hold_the_estimates(model):
  figure = sm.plots.mixed_model(model, "all")
  parts = dict(zip(KINDS, figure.subfigs, strict=True))
  effects, own = mixed.effects(model), mixed.unshrunk(model)
  for ax, key in zip(parts["groups"].axes, effects, strict=True):
    order = np.argsort(-effects[key].value, kind="stable")
    found = [line.get_xdata() for line in ax.lines]
    for want in (own[key][order], effects[key].value[order]):
      assert any(np.array_equal(x, want) for x in found if len(x) == len(want))
  for ax, key in zip(parts["shrinkage"].axes, effects, strict=True):
    points = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(points, np.stack([own[key], effects[key].value], 1))
  mean, residuals = mixed.residuals(model)
  dots = parts["residuals"].axes[0].lines[1]
  np.testing.assert_allclose((dots.get_xdata(), dots.get_ydata()), (mean, residuals))
  line = parts["quantiles"].axes[0].lines[1]
  np.testing.assert_allclose(line.get_ydata(), np.sort(residuals))


def test_the_lines_of_every_group(model):
  figure = sm.plots.mixed_model(model, "lines")
  design, effects, own = model.design, mixed.effects(model), mixed.unshrunk(model)
  fixed = model.estimates.fixed
  assert [ax.get_title() for ax in figure.axes] == list(design.random[0].levels)
  for g, ax in enumerate(figure.axes):
    rows = np.flatnonzero(design.random[0].index == g)
    rows = rows[np.argsort(design.fixed[rows, 1])]
    x = design.fixed[rows, 1]
    line = lambda intercept, slope, x=x: intercept + slope * x
    wanted = (
      design.response[rows],
      line(*(effects[name].value[g] for name in ("(Intercept)", "x"))),
      line(*(own[name][g] for name in ("(Intercept)", "x"))),
      line(*fixed.values()),
    )
    for drawn, want in zip(ax.lines, wanted, strict=True):
      np.testing.assert_allclose(drawn.get_xdata(), x)
      np.testing.assert_allclose(drawn.get_ydata(), want, atol=1e-9)
  words = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
  assert words == ["shrunk", "by itself", "fixed effects"]


@pytest.mark.parametrize("kind", (*KINDS, "all"))
def test_names_are_shown_as_they_are(model, kind):
  figure = sm.plots.mixed_model(model, kind)
  wanted = {
    "groups": ("$5", "a_b$", r"$\frac$", "(Intercept) by $g$", "x by $g$", "fixed effect ± sd"),
    "lines": ("$5", "a_b$", r"$\frac$", "y$x$", "x"),
    "shrinkage": ("(Intercept) by itself", "x by itself", "x shrunk"),
    "residuals": ("fitted y$x$", "Pearson residual"),
    "quantiles": ("residuals", "(Intercept)", "x", "normal quantile"),
  }
  check_texts(figure, *wanted.get(kind, [name for names in wanted.values() for name in names]))


def test_a_group_of_one_row_has_dots():
  rng = np.random.default_rng(5)
  g = np.array([0, *np.repeat(np.arange(1, 5), 4)])
  x, y = rng.normal(size=17), rng.normal(size=5)[g] + 0.3 * rng.normal(size=17)
  figure = sm.plots.mixed_model(mixed.fit("y ~ x + (1 | g)", {"y": y, "x": x, "g": g}), "lines")
  markers = [{line.get_marker() for line in ax.lines[1:]} for ax in figure.axes]
  assert markers == [{"o"}, *[{""}] * 4]


def test_a_group_has_no_line_of_its_own_if_a_coefficient_is_pooled():
  """Its own intercept belongs to its own slope, which is no random effect."""
  rng = np.random.default_rng(4)
  g, x = np.repeat(np.arange(5), 4), 100 + np.tile(np.arange(4.0), 5)
  y = rng.normal(size=5)[g] + x + 0.5 * rng.normal(size=20)
  model = mixed.fit("y ~ x + (1 | g)", {"y": y, "x": x, "g": g})
  figure = sm.plots.mixed_model(model, "lines")
  words = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
  assert words == ["shrunk", "fixed effects"]


def test_many_groups_share_a_panel():
  rng = np.random.default_rng(2)
  g, x = np.repeat(np.arange(50), 3), np.tile([0.0, 1.0, 2.0], 50)
  y = rng.normal(size=50)[g] + x + 0.5 * rng.normal(size=150)
  model = mixed.fit("y ~ x + (1 | g)", {"y": y, "x": x, "g": g})
  figure = sm.plots.mixed_model(model, "lines", x="x")
  (ax,) = figure.axes
  assert len(ax.lines) == 51  # the rows, and a line for each group
  np.testing.assert_allclose(ax.lines[7].get_ydata(), mixed.residuals(model)[0][18:21])
  check_texts(figure, "50 groups of g", "shrunk")
  check_texts(sm.plots.mixed_model(model, "groups"), "(Intercept) by g")


@pytest.mark.parametrize("family", ("logistic", "poisson"))
def test_families_without_estimates_of_single_groups(family):
  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(8), 10)
  model = mixed.fit("y ~ 1 + (1 | g)", {"y": rng.integers(0, 2, 80), "g": g}, family=family)
  figure = sm.plots.mixed_model(model, "all")  # without "lines": there is no covariate
  figure.draw_without_rendering()
  groups, shrinkage, *_ = (part.axes[0] for part in figure.subfigs)
  (offsets,) = [c.get_offsets() for c in shrinkage.collections]
  assert len(offsets) == 0  # a group alone has no estimate
  names = [text.get_text() for text in groups.get_legend().get_texts()]
  assert names == ["fixed effect ± sd", "fixed effect", "shrunk, 95 % interval"]


def test_shares_of_trials_and_nested_groups():
  rng = np.random.default_rng(3)
  a, b, x = np.repeat(np.arange(4), 6), np.tile(np.repeat([0, 1], 3), 4), np.tile(np.arange(3.0), 8)
  n = rng.integers(3, 9, 24)
  data = {"k": rng.binomial(n, 0.4), "n": n, "x": x, "a": a, "b": b}
  model = mixed.fit("k ~ x + (1 | a/b)", data, family="logistic", trials="n")
  figure = sm.plots.mixed_model(model, "lines")
  assert [ax.get_title() for ax in figure.axes] == list(model.design.random[1].levels)
  rows, line, _ = figure.axes[1].lines
  np.testing.assert_allclose(rows.get_ydata(), (data["k"] / n)[3:6])
  np.testing.assert_allclose(line.get_ydata(), mixed.predict(model).mean[3:6])


def test_refuses_what_it_cannot_draw(model):
  with pytest.raises(ValueError, match="kind must be one of groups, lines, .* or all; got 'line'"):
    sm.plots.mixed_model(model, "line")
  with pytest.raises(ValueError, match="x must be one of x; got 'z'"):
    sm.plots.mixed_model(model, "lines", x="z")
  with pytest.raises(TypeError, match="model must be what mixed.fit returned"):
    sm.plots.mixed_model(model.estimates)
  plain = mixed.fit("y ~ (1 | g)", {"y": [1, 2, 3, 3, 7, 8.0], "g": [*"aabbcc"]})
  with pytest.raises(ValueError, match="'lines' needs a covariate"):
    sm.plots.mixed_model(plain, "lines")
