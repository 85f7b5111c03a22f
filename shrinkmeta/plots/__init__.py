"""Pictures of what the library finds, as matplotlib figures.

Every function returns a `matplotlib.figure.Figure` and opens no window, except for `sigma_picture`.
It returns a callback of `fit` that writes a picture to a file. Save a figure with
`figure.savefig("picture.png")`. In a notebook, run `%matplotlib inline` once, and a figure at the
end of a cell is shown. matplotlib is imported by the first picture: `pip install
'shrinkmeta[plots]'`. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from shrinkmeta.plots.adaptation import adaptation_curves
from shrinkmeta.plots.choice import choice_curve
from shrinkmeta.plots.estimates import shrunk_estimates
from shrinkmeta.plots.mixed_models.draw import mixed_model
from shrinkmeta.plots.reliability import reliability_diagram
from shrinkmeta.plots.sigma import sigma_by_module, sigma_history, sigma_picture

__all__ = (
  "adaptation_curves",
  "choice_curve",
  "mixed_model",
  "reliability_diagram",
  "shrunk_estimates",
  "sigma_by_module",
  "sigma_history",
  "sigma_picture",
)
