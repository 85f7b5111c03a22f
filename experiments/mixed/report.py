"""A fit as text, as JSON and as a picture."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.mixed.formula import Formula
from experiments.mixed.model import Fit
from experiments.mixed.table import Grouped
from experiments.runs import files

_CRITERION = {
  "ml": "log-likelihood",
  "reml": "restricted log-likelihood",
  "predictive": "predictive log-likelihood of the held-out halves",
}


def text(fitted: Fit, formula: Formula, data: Grouped, family: str, estimator: str) -> str:
  """What the binary prints."""
  sizes = np.asarray(data.batches.mask).sum(1).astype(int)
  wald = estimator != "predictive"  # which has neither errors nor intervals
  lines = [
    f"{formula.response} by {formula.group}, {family}, {estimator}: {data.rows} rows, "
    f"{len(data.groups)} groups of {sizes.min()} to {sizes.max()}",
    "",
    f"{'fixed effect':<24}{'estimate':>12}" + (f"{'se':>12}" if wald else ""),
  ]
  for term, value in fitted.fixed.items():
    se = f"{fitted.fixed_se[term]:>12.4g}" if wald else ""
    lines.append(f"{term:<24}{value:>12.6g}{se}")
  lines += [
    "",
    f"{'standard deviation':<24}{'estimate':>12}" + ("   95 % interval" if wald else ""),
  ]
  rows = [(f"{term} by {formula.group}", fitted.sd[term], fitted.sd_interval[term])
          for term in formula.random]  # fmt: skip
  if fitted.residual is not None and fitted.residual_interval is not None:
    rows.append(("residual", fitted.residual, fitted.residual_interval))
  for name, value, (low, high) in rows:
    note = "boundary estimate" if value == 0 else f"[{low:.4g}, {high:.4g}]" if wald else ""
    lines.append(f"{name:<24}{value:>12.6g}   {note}".rstrip())
  lines += ["", f"{_CRITERION[estimator]} {fitted.criterion:.4f}"]
  if estimator != "ml":
    lines.append(f"log-likelihood at these estimates {fitted.log_likelihood:.4f}")
  if family != "gaussian":
    lines.append("Likelihoods of this family are Laplace's approximation.")
  if fitted.singular:
    lines.append(
      f"Singular fit: the {_CRITERION[estimator]} is highest at a standard deviation of 0 for "
      f"{', '.join(fitted.singular)}. A boundary estimate, and not evidence of no variation."
    )
  if fitted.undetermined:
    lines.append(f"NOT DETERMINED by these data, or hardly: {', '.join(fitted.undetermined)}.")
  if not fitted.converged:
    lines.append(f"NOT CONVERGED: the largest gradient is {fitted.gradient:.2g} an example.")
  return "\n".join(lines)


def as_json(
  fitted: Fit,
  data: Grouped,
  effects: Mapping[str, tuple[np.ndarray, np.ndarray]],
  own: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
) -> dict[str, Any]:
  """All of it; numbers that do not exist are null."""
  number = lambda x: None if x is None or not math.isfinite(x) else float(x)
  none = lambda pair: pair is None or all(math.isnan(x) for x in pair)
  interval = lambda pair: None if none(pair) else [number(x) for x in pair]
  sizes = np.asarray(data.batches.mask).sum(1)
  groups = {}
  for g, name in enumerate(data.groups):
    terms = {
      term: {
        "estimate": number(mean[g]),
        "sd": number(sd[g]),
        "unshrunk": number(own[term][g]),
      }
      for term, (mean, sd) in effects.items()
    }
    groups[name] = {"rows": int(sizes[g]), "terms": terms}
  return {
    "fixed": {term: number(x) for term, x in fitted.fixed.items()},
    "fixed_se": {term: number(x) for term, x in fitted.fixed_se.items()},
    "sd": {term: number(x) for term, x in fitted.sd.items()},
    "sd_interval": {term: interval(x) for term, x in fitted.sd_interval.items()},
    "residual": number(fitted.residual),
    "residual_interval": interval(fitted.residual_interval),
    "log_likelihood": number(fitted.log_likelihood),
    "criterion": number(fitted.criterion),
    "singular": list(fitted.singular),
    "undetermined": list(fitted.undetermined),
    "converged": fitted.converged,
    "groups": groups,
    **config,
  }


def plot(
  path: pathlib.Path,
  fitted: Fit,
  formula: Formula,
  data: Grouped,
  effects: Mapping[str, tuple[np.ndarray, np.ndarray]],
  own: Mapping[str, np.ndarray],
) -> None:
  """Groups in order of their shrunk estimates, beside their own: one panel a random term."""
  count = len(data.groups)
  figure = matplotlib.figure.Figure(
    figsize=(4.2 * len(formula.random), min(9.0, 1.6 + 0.18 * count)), layout="constrained"
  )
  axes = figure.subplots(1, len(formula.random), squeeze=False)[0]
  for ax, term in zip(axes, formula.random, strict=True):
    mean, sd = effects[term]
    order, y = np.argsort(mean), np.arange(count)
    centre, spread = fitted.fixed.get(term, 0.0), fitted.sd[term]
    ax.axvspan(centre - spread, centre + spread, color="0.92", label=r"$\varphi \pm \sigma$")
    ax.axvline(centre, color="0.6", linewidth=1)
    ax.plot(own[term][order], y, "o", mfc="none", color="tab:orange", ms=4, label="by itself")
    ax.errorbar(mean[order], y, xerr=1.96 * sd[order], fmt="o", color="tab:blue", ms=4,
                linewidth=1, label=r"shrunk, 95 %")  # fmt: skip
    shown = count <= 60
    names = [data.groups[i] for i in order] if shown else []
    # Names are shown as they are: between two dollars matplotlib would read a formula.
    ax.set_yticks(y if shown else [], names, fontsize=7, parse_math=False)
    inner = np.concatenate([mean - 2 * sd, mean + 2 * sd, [centre - spread, centre + spread]])
    width = np.ptp(inner) or 1.0
    ax.set_xlim(inner.min() - 0.5 * width, inner.max() + 0.5 * width)
    ax.set_ylim(-1, count)
    low, high = fitted.sd_interval[term]
    between = "" if math.isnan(low) else f"[{low:.3g}, {high:.3g}]"
    between = "on the boundary" if spread == 0 else between
    ax.set_title(rf"$\sigma$ {spread:.3g}  {between}", fontsize=10)
    ax.set_xlabel(term, parse_math=False)
  axes[0].set_ylabel(formula.group, parse_math=False)
  axes[0].legend(fontsize=8, loc="lower right")
  with files.atomic(path) as temporary:
    figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
