"""Draw a picture of a mixed model, chosen by name, or all pictures below each other."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from shrinkmeta.checks import validate
from shrinkmeta.plots import look
from shrinkmeta.plots.mixed_models import groups, lines, residuals

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from shrinkmeta.mixed import Model


class _Kind(NamedTuple):
  """A picture: `size(model)` is its width and height in inches, `draw` fills a subfigure.

  `draw` takes the subfigure and the model, and in "lines" the covariate.
  """

  size: Callable[[Any], tuple[float, float]]
  draw: Callable[..., None]


_KINDS = {
  "groups": _Kind(groups.size_of_groups, groups.draw_groups),
  "lines": _Kind(lines.size, lines.draw),
  "shrinkage": _Kind(groups.size_of_shrinkage, groups.draw_shrinkage),
  "residuals": _Kind(residuals.size_of_residuals, residuals.draw_residuals),
  "quantiles": _Kind(residuals.size_of_quantiles, residuals.draw_quantiles),
}


def mixed_model(model: "Model", kind: str = "groups", *, x: str | None = None) -> "Figure":
  """Draw a fitted mixed model.

  =========  ================================================================================
  kind       shows
  =========  ================================================================================
  groups     every group's shrunk estimate with its interval, beside the group's own estimate
  lines      the data of every group against a covariate, with the fitted lines
  shrinkage  shrunk estimates against the groups' own estimates
  residuals  Pearson residuals against fitted means
  quantiles  residuals and standardised group effects against a normal distribution
  all        all of these, "lines" only if the model has a covariate
  =========  ================================================================================

  Args:
    model: what `mixed.fit` returned.
    kind: the picture, a word of the table.
    x: the covariate of "lines": the name of a column of the model, as the summary writes it. None
      takes the first covariate whose effect differs between groups, or else the first one.

  Returns:
    A matplotlib Figure.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> from shrinkmeta import mixed
    >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
    >>> figure = mixed_model(mixed.fit("y ~ (1 | g)", data))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['c', 'b', 'a']
  """
  look.import_matplotlib()
  from matplotlib.figure import Figure

  from shrinkmeta.mixed import Model

  validate.instance("model", model, Model, "what mixed.fit returned")
  if kind not in (*_KINDS, "all"):
    raise ValueError(f"kind must be one of {', '.join(_KINDS)} or all; got {kind!r}.")
  validate.instance("x", x, (str, type(None)), "the name of a covariate, or None")
  if x is not None or kind in ("lines", "all"):
    x = lines.covariate(model, x, needed=kind == "lines")
  kinds = [one for one in _KINDS if one != "lines" or x] if kind == "all" else [kind]
  sizes = [_KINDS[one].size(model) for one in kinds]
  heights = [height for _, height in sizes]
  figure = Figure(figsize=(max(width for width, _ in sizes), sum(heights)), layout="constrained")
  parts = figure.subfigures(len(kinds), 1, height_ratios=heights, squeeze=False)[:, 0]
  for part, one in zip(parts, kinds, strict=True):
    _KINDS[one].draw(part, model, *([x] if one == "lines" else []))
  return figure
