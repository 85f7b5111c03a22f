"""A fit as JSON, and predictions as text."""

import math
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.runs import files
from shrinkmeta import mixed

_SHOWN = 20  # predictions that are printed


def as_json(
  model: mixed.Model,
  found: mixed.Summary,
  predictions: mixed.Predictions | None,
  config: Mapping[str, Any],
) -> dict[str, Any]:
  """Return the whole fit as JSON; numbers that do not exist are null.

  `groups` is {label: estimates} for one grouping factor, and {factor: {label: estimates}} for
  several.
  """
  fit = model.estimates
  profile = {key: row.profile for key, row in zip([*fit.sd, "residual"], found.sd, strict=False)}
  content = {
    "fixed": _numbers(fit.fixed),
    "fixed_se": _numbers(fit.fixed_se),
    "fixed_se_conditional": _numbers(fit.fixed_se_conditional),
    "fixed_df": {row.name: _number(row.df) for row in found.fixed},
    "fixed_p": {row.name: _number(row.p) for row in found.fixed},
    "sd": _numbers(fit.sd),
    "sd_interval": {name: _interval(pair) for name, pair in fit.sd_interval.items()},
    "sd_profile": {name: _interval(pair) for name, pair in profile.items()},
    "correlation": {" ".join(pair): _number(x) for pair, x in fit.correlation.items()},
    "correlation_interval": {
      " ".join(pair): _interval(ends) for pair, ends in fit.correlation_interval.items()
    },
    "residual": _number(fit.residual),
    "residual_interval": _interval(fit.residual_interval),
    "log_likelihood": _number(fit.log_likelihood),
    "criterion": _number(fit.criterion),
    "aic": _number(found.aic),
    "bic": _number(found.bic),
    "icc": _numbers(found.icc),
    "singular": list(fit.singular),
    "undetermined": list(fit.undetermined),
    "perfect": fit.perfect,
    "converged": fit.converged,
    "rows": fit.rows,
    "dropped": dict(model.design.dropped),
    "groups": _groups(model),
  }
  if predictions is not None:
    content["predictions"] = {
      name: [bool(x) if name == "known" else _number(x) for x in values]
      for name, values in predictions._asdict().items()
    }
  return content | dict(config)


def write(path: str, content: Mapping[str, Any]) -> None:
  """Write strict JSON to a file, whole or not at all."""
  # Not `files.write_document`: it would start JAX, which takes longer than the fit.
  environment = {"python": platform.python_version(), **files.versions()}
  text = files.strict_json({**content, "environment": environment}, indent=2)
  with files.atomic(path) as temporary:
    temporary.write_text(text + "\n", encoding="utf-8")


def predicted(found: mixed.Predictions) -> str:
  """Return the first predictions as a table."""
  lines = ["", f"{'row':>6}{'mean':>12}{'se of eta':>12}   95 % interval"]
  for i in range(min(len(found.mean), _SHOWN)):
    new = "" if found.known[i] else "   a new group"
    lines.append(
      f"{i + 1:>6}{found.mean[i]:>12.6g}{found.se[i]:>12.4g}   "
      f"[{found.low[i]:.5g}, {found.high[i]:.5g}]{new}"
    )
  if len(found.mean) > _SHOWN:
    lines.append(f"and {len(found.mean) - _SHOWN} more rows; --json has them all.")
  return "\n".join(lines)


def _groups(model: mixed.Model) -> dict[str, Any]:
  own, factors = mixed.unshrunk(model), tuple(model.estimates.groups)
  found: dict[str, Any] = {}
  for key, effect in mixed.effects(model).items():
    place = found if len(factors) == 1 else found.setdefault(effect.group, {})
    term = key if len(factors) == 1 else key.removeprefix(f"{effect.group} ")
    for g, label in enumerate(effect.levels):
      entry = place.setdefault(label, {"rows": int(effect.rows[g]), "terms": {}})
      entry["terms"][term] = {
        "estimate": _number(effect.value[g]),
        "sd": _number(effect.sd[g]),
        "unshrunk": _number(own[key][g]),
      }
  return found


def _number(x: float | np.floating | None) -> float | None:
  return None if x is None or not math.isfinite(x) else float(x)


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
  return {name: _number(x) for name, x in values.items()}


def _interval(pair: tuple[float, float] | None) -> list[float | None] | None:
  if pair is None or all(math.isnan(x) for x in pair):
    return None
  return [_number(x) for x in pair]
