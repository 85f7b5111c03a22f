"""Summarise a fit as numbers and as a text of tables.

    AIC = -2 l + 2 k,   BIC = -2 l + k log N,   ICC of factor f = v_f / (sum_f v_f + v_e),
    v_f = mean_i z_i' Sigma_f z_i,   v_e = mean_i s^2 / w_i, or pi^2 / 3 if logistic

l is the maximum of the criterion, k the number of all parameters, and N the number of rows. In row
i, z_i are the columns of the random effects of factor f, and w_i is the weight. Sigma_f is the
covariance of these effects, and s the residual standard deviation. So v_f is the variance between
the groups of f, and v_e the residual variance, both averaged over the rows. The ICC (intraclass
correlation) of a grouping factor is its share of the variance.

References:
  Johnson (2014). Extension of Nakagawa & Schielzeth's R^2 GLMM to random slopes models. Methods in
  Ecology and Evolution 5(9), for the averaged variance.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.special

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed.answers.degrees import degrees_of_freedom
from shrinkmeta.mixed.criteria.blocks import key_of
from shrinkmeta.mixed.result import Fit

_WIDTH = 88  # characters of a line of notes
_CRITERION = {
  "ml": "log-likelihood",
  "reml": "restricted log-likelihood",
  "predictive": "predictive log-likelihood of the held-out halves",
}


class FixedRow(NamedTuple):
  """A fixed effect: estimate, standard error, t = estimate / se, two-sided p, 95 % interval.

  For the gaussian family p and the interval use Student's t with Satterthwaite's `df`. For other
  families they use the normal distribution, and `df` is inf.
  """

  name: str
  estimate: float
  se: float
  df: float
  t: float
  p: float
  low: float
  high: float


class SdRow(NamedTuple):
  """A standard deviation: estimate, Wald's 95 % interval on the log scale, profile interval."""

  name: str
  estimate: float
  low: float
  high: float
  profile: tuple[float, float] | None


class Summary(NamedTuple):
  """The summary of a fit; `print(summary)` shows it as tables.

  Attributes:
    title: the response, the grouping factors, the family, the estimator and the number of rows.
    fixed: the fixed effects.
    sd: the standard deviations. The last one is that of the residual, if there is one.
    correlation: {"a, b by g": the correlation of the random effects a and b of factor g}.
    correlation_interval: {"a, b by g": Wald's 95 % interval on Fisher's z scale}.
    criterion: (name, value) of the maximised criterion: the log likelihood, the restricted log
      likelihood, or the predictive log-likelihood of held-out halves.
    log_likelihood: the log likelihood at the estimates.
    parameters: k, the number of all parameters.
    aic, bic: the two information criteria. They are None for the "predictive" estimator
      and for a perfect fit.
    icc: {factor: its share of the variance}. It is empty for the Poisson family.
    groups: {factor: (number of groups, rows of the smallest group, rows of the largest group)}.
    dropped: (reason, number of rows) for the rows that were left out.
    notes: remarks on the standard errors, on singular fits and on undetermined parameters.
  """

  title: str
  fixed: tuple[FixedRow, ...]
  sd: tuple[SdRow, ...]
  correlation: dict[str, float]
  correlation_interval: dict[str, tuple[float, float]]
  criterion: tuple[str, float]
  log_likelihood: float
  parameters: int
  aic: float | None
  bic: float | None
  icc: dict[str, float]
  groups: dict[str, tuple[int, int, int]]
  dropped: tuple[tuple[str, int], ...]
  notes: tuple[str, ...]

  def __str__(self) -> str:
    """The tables."""
    return text(self)


def of(
  fit: Fit, design: Design, profile: Mapping[str, tuple[float, float]] | None = None
) -> Summary:
  """Summarise a fit.

  Args:
    fit: the fit.
    design: the design of this fit.
    profile: {name of a standard deviation, or "residual": profile interval}, or None. The summary
      shows these intervals next to Wald's.

  Returns:
    A Summary.
  """
  fixed = []
  likelihood = fit.estimator != "predictive" and not fit.perfect
  gaussian = fit.residual is not None and likelihood and bool(fit.fixed)
  freedom = degrees_of_freedom(fit, design) if gaussian else [math.inf] * len(fit.fixed)
  for (name, value), df in zip(fit.fixed.items(), map(float, freedom), strict=True):
    se = fit.fixed_se[name]
    t = value / se if se > 0 else math.nan
    p = 2 * float(scipy.special.stdtr(df, -abs(t)))
    width = float(scipy.special.stdtrit(df, 0.975)) * se
    fixed.append(FixedRow(name, value, se, df, t, p, value - width, value + width))
  effects = _effects(fit, design)
  by = lambda key: " by ".join(effects[key])
  pair = lambda a, b: f"{effects[a][0]}, {by(b)}"
  profile = profile or {}
  sds = [
    SdRow(by(key), value, *fit.sd_interval[key], profile.get(key)) for key, value in fit.sd.items()
  ]
  if fit.residual is not None and fit.residual_interval is not None:
    sds.append(SdRow("residual", fit.residual, *fit.residual_interval, profile.get("residual")))
  k = sum(fit.parameters)
  sizes = {term.group: np.bincount(term.index) for term in design.random}
  return Summary(
    _title(fit, design),
    tuple(fixed),
    tuple(sds),
    {pair(*names): value for names, value in fit.correlation.items()},
    {pair(*names): ends for names, ends in fit.correlation_interval.items()},
    (_CRITERION[fit.estimator], fit.criterion),
    fit.log_likelihood,
    k,
    float(-2 * fit.criterion + 2 * k) if likelihood else None,
    float(-2 * fit.criterion + k * math.log(fit.rows)) if likelihood else None,
    _icc(fit, design),
    {name: (len(size), int(size.min()), int(size.max())) for name, size in sizes.items()},
    design.dropped,
    _notes(fit),
  )


def text(found: Summary) -> str:
  """Format a Summary as text.

  Args:
    found: the summary.

  Returns:
    The tables and the notes, without a newline at the end.
  """
  lines = [found.title]
  if found.dropped:
    count = sum(rows for _, rows in found.dropped)
    reasons = ", ".join(f"{reason} ({rows})" for reason, rows in found.dropped)
    lines.append(f"{count} row{'s' if count > 1 else ''} left out: {reasons}")
  names = [row.name for row in (*found.fixed, *found.sd)] + list(found.correlation)
  width = max(24, *(len(name) + 1 for name in names))
  wald = found.aic is not None
  student = any(math.isfinite(row.df) for row in found.fixed)
  heads = ("se", *(("df", "t") if student else ("z",)), "p") if wald else ()
  if found.fixed:
    lines += ["", _line(width, "fixed effect", "estimate", *heads)]
    lines[-1] += "   95 % interval" if wald else ""
  for row in found.fixed:
    df = (f"{row.df:.1f}",) if student else ()
    numbers = (f"{row.se:.4g}", *df, f"{row.t:.2f}", _p(row.p)) if wald else ()
    interval = f"   [{row.low:.5g}, {row.high:.5g}]" if wald else ""
    lines.append(_line(width, row.name, f"{row.estimate:.6g}", *numbers) + interval)
  profiled = any(row.profile for row in found.sd)
  heading = "   95 % interval" + ("   by profile" if profiled else "")
  lines += ["", _line(width, "standard deviation", "estimate") + (heading if wald else "")]
  for row in found.sd:
    note = "boundary estimate" if row.estimate == 0 else f"[{row.low:.4g}, {row.high:.4g}]"
    if row.profile is not None:
      note += f"   [{row.profile[0]:.4g}, {row.profile[1]:.4g}]"
    shown = note if wald or row.estimate == 0 else ""
    lines.append(f"{_line(width, row.name, f'{row.estimate:.6g}')}   {shown}".rstrip())
  if found.correlation:
    lines += ["", _line(width, "correlation", "estimate") + ("   95 % interval" if wald else "")]
    for name, value in found.correlation.items():
      low, high = found.correlation_interval[name]
      shown = "" if math.isnan(low) else f"   [{low:.4g}, {high:.4g}]"
      lines.append(_line(width, name, f"{value:.4f}") + shown)
  lines += ["", f"{found.criterion[0]} {found.criterion[1]:.4f}"]
  if found.criterion[0] != _CRITERION["ml"]:
    lines.append(f"log-likelihood at these estimates {found.log_likelihood:.4f}")
  if found.criterion[0] == _CRITERION["reml"]:
    lines.append(f"REML criterion {-2 * found.criterion[1]:.4f}")
  if found.aic is not None:
    lines.append(f"AIC {found.aic:.2f}, BIC {found.bic:.2f}, {found.parameters} parameters")
  if found.icc:
    shares = ", ".join(f"{name} {share:.4f}" for name, share in found.icc.items())
    lines.append(f"share of the variance between groups (ICC): {shares}")
  notes = (line for note in found.notes for line in textwrap.wrap(note, _WIDTH))
  return "\n".join([*lines, *notes])


def _title(fit: Fit, design: Design) -> str:
  factors = list(dict.fromkeys(term.group for term in design.random))
  index = {term.group: term.index for term in design.random}
  groups = []
  for name in factors:
    size = np.bincount(index[name])
    of = f" of {name}" if len(factors) > 1 else ""
    groups.append(f"{len(size)} groups{of} of {size.min()} to {size.max()}")
  return (
    f"{design.response_name} by {', '.join(factors)}, {fit.family}, {fit.estimator}: {fit.rows} "
    f"rows, {', '.join(groups)}"
  )


def _effects(fit: Fit, design: Design) -> dict[str, tuple[str, str]]:
  """{name in `Fit.sd`: (column, grouping factor)}."""
  return {
    key_of(term.group, name, len(fit.groups) > 1): (name, term.group)
    for term in design.random
    for name in term.names
  }


def _icc(fit: Fit, design: Design) -> dict[str, float]:
  if fit.family == "poisson":
    return {}
  own: dict[str, float] = {}
  for term, sigma in zip(design.random, fit.covariances, strict=True):
    variance = float(np.einsum("ni,ij,nj->n", term.columns, sigma, term.columns).mean())
    own[term.group] = own.get(term.group, 0.0) + variance
  weights = 1.0 if design.weights is None else np.asarray(design.weights)
  error = math.pi**2 / 3
  if fit.residual is not None:
    error = float(np.mean(fit.residual**2 / weights))
  total = sum(own.values()) + error
  return {name: variance / total for name, variance in own.items()}


def _notes(fit: Fit) -> tuple[str, ...]:
  what = _CRITERION[fit.estimator]
  notes = []
  if fit.estimator != "predictive" and fit.fixed and not fit.perfect:
    text = "Standard errors allow for the estimation of the standard deviations."
    if fit.family == "gaussian":
      given = ", ".join(f"{se:.4g}" for se in fit.fixed_se_conditional.values())
      text += f" At given ones, as lme4 prints them, they are {given}."
    notes.append(text)
  if fit.family != "gaussian":
    notes.append("Likelihoods of this family are Laplace's approximation.")
  if fit.singular:
    notes.append(
      f"Singular fit: the {what} is highest at a standard deviation of 0 for "
      f"{', '.join(fit.singular)}. A boundary estimate, and not evidence of no variation."
    )
  if fit.singular_correlation:
    notes.append(
      f"Singular fit: the {what} is highest where effects by "
      f"{', '.join(fit.singular_correlation)} are combinations of one another, as at a correlation "
      "of 1. Try || in place of |."
    )
  if fit.perfect and fit.residual is not None:
    notes.append(
      "PERFECT FIT: the model repeats the response to its last digits. The likelihood grows "
      "without end as the residual goes to 0. The residual and the log-likelihood above are those "
      "of rounding, and there are no standard errors, intervals, AIC or BIC."
    )
  elif fit.perfect:
    notes.append(
      "COMPLETE SEPARATION: fixed effects and groups tell all successes from all failures. The "
      "likelihood grows, or hardly falls, as the effects go to infinity, and the estimates are a "
      "product of Laplace's approximation. So there are no standard errors, intervals, AIC or BIC."
    )
  if fit.undetermined:
    notes.append(f"NOT DETERMINED by these data, or hardly: {', '.join(fit.undetermined)}.")
  if not fit.converged:
    notes.append(f"NOT CONVERGED: the largest gradient is {fit.gradient:.2g} an example.")
  return tuple(notes)


def _line(width: int, name: str, *numbers: str) -> str:
  widths = (12, 12) + ((8,) if len(numbers) == 5 else ()) + (10, 11)
  return f"{name:<{width}}" + "".join(
    f" {number:>{w - 1}}" for number, w in zip(numbers, widths, strict=False)
  )


def _p(value: float) -> str:
  return "nan" if math.isnan(value) else "< 1e-16" if value < 1e-16 else f"{value:.2g}"
