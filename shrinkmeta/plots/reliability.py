"""A reliability diagram: the accuracy of a classifier against its confidence."""

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy  # loads scipy.special, half a second, at its first use

from shrinkmeta.plots import look
from shrinkmeta.uncertainty.calibration import calibration

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def reliability_diagram(
  log_probabilities: Any, targets: Any, mask: Any = None, bins: int = 15, *, ax: Any = None
) -> "Figure":
  """Draw the accuracy of a classifier against its confidence, with the share of predictions.

  Predictions are sorted into bins as in `calibration`. A point is a bin with its mean confidence,
  its accuracy, and Wilson's 95 % interval. Calibrated predictions lie on the diagonal. With weights
  w the interval is that of Kish's effective number of predictions in the bin:

      n = (sum w)^2 / sum w^2

  It does not depend on the unit of the weights, and a weight of 2 is not two predictions.

  Args:
    log_probabilities: [N, C], log-probabilities or logits. Each row is normalised by log-softmax.
    targets: [N] integers from 0 to C - 1, the right classes.
    mask: [N], 0 for examples that do not count, or weights. None: all examples count once.
    bins: the number of bins of equal width over (0, 1].
    ax: matplotlib Axes to draw on. None makes a figure.

  Returns:
    A matplotlib Figure. Its title has the expected calibration error.

  Raises:
    ImportError: matplotlib is not installed.
    TypeError, ValueError: an argument is wrong; the message names it.

  References: Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks, arXiv
    1706.04599; Wilson, Probable inference, the law of succession, and statistical inference, 1927;
    Kish, Survey Sampling, 1965.

  Example:
    >>> log_p = np.log(np.array([[0.8, 0.2], [0.8, 0.2]]))
    >>> figure = reliability_diagram(log_p, np.array([0, 1]))
    >>> figure.axes[0].get_title(loc="left")
    'Expected calibration error 0.300, 2 predictions'
  """
  found = calibration(log_probabilities, targets, mask, bins)  # checks the arguments
  log_p = np.asarray(log_probabilities, float)
  log_p = log_p - scipy.special.logsumexp(log_p, axis=1, keepdims=True)
  weight = np.ones(len(log_p)) if mask is None else np.asarray(mask, float)
  confidence = np.exp(log_p.max(1))
  right = log_p.argmax(1) == np.asarray(targets)
  counts = (weight > 0) & np.isfinite(confidence)
  place = np.clip(np.ceil(confidence[counts] * bins).astype(int) - 1, 0, bins - 1)
  total = lambda x: np.bincount(place, weight[counts] * x[counts], bins)
  n = total(np.ones_like(weight))
  full = n > 0
  x, accuracy = total(confidence)[full] / n[full], total(right.astype(float))[full] / n[full]
  low, high = _wilson(accuracy, n[full] ** 2 / total(weight)[full])

  figure, ax = look.panel(ax, 5.0, 5.2)
  edges = (np.arange(bins) + 0.5) / bins
  grey = {"color": "#d9d9d9", "width": 0.92 / bins, "zorder": 1}
  entries = {"share of predictions": ax.bar(edges, n / (n.sum() or 1.0), **grey)}
  entries["calibrated"] = ax.plot([0, 1], [0, 1], color=look.QUIET, linestyle="--", linewidth=1)[0]
  style = {"marker": "o", "markersize": 5, "capsize": 2.5, "linewidth": 1.3, "zorder": 3}
  bars = [np.maximum(accuracy - low, 0), np.maximum(high - accuracy, 0)]
  entries["accuracy, 95 % interval"] = ax.errorbar(x, accuracy, bars, color=look.COLORS[0], **style)
  ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
  look.axis_labels(ax, "confidence: probability of the likeliest class", "accuracy")
  predictions = look.counted(int(counts.sum()), "prediction")
  look.title(ax, f"Expected calibration error {float(found.ece):.3f}, {predictions}")
  look.legend_above(ax, entries, width=3.8)
  return figure


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return Wilson's 95 % interval of a share of n."""
  z = scipy.special.ndtri(0.975)
  middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
  return middle - half, middle + half
