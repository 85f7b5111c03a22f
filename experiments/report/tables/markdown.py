"""Parts that all tables share: layout as text and as Markdown, numbers with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.statistics import group_by_algorithm, interval
from experiments.runs.results import Curve


def sample(curves: Sequence[Curve], over: str = "episodes") -> str:
  """Return a phrase that names the sample behind a table's intervals."""
  counts = {name: len(group) for name, group in group_by_algorithm(curves).items()}
  most = max(counts.values())
  fewer = ", ".join(f"{name}: {n}" for name, n in counts.items() if n < most)
  return (
    f"mean ± 95 % interval over {np.asarray(curves[0].accuracy).shape[1]} {over}, "
    f"each the mean of {most} seed{'s' * (most != 1)}" + (f" ({fewer})" if fewer else "")
  )


def plus_minus(values: np.ndarray, digits: int, sign: str = "") -> str:
  """Return mean ± half width of the 95 % interval; "diverged" if the mean is not finite."""
  mean, half = interval(values)
  if not math.isfinite(mean):
    return "diverged"  # one episode of one seed suffices
  form = ".1e" if abs(mean) >= 1e5 else f".{digits}f"
  return f"{mean:{sign}{form}} ± {half:{form}}"


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Return a table that reads as text and as Markdown, numbers aligned right."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  line = lambda cells: (
    "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"
  )
  rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
  return "\n".join([line(header), rule, *map(line, rows)])


def aligned(records: Sequence[Mapping[str, Any]]) -> str:
  """Return records with the same keys as columns of text, under a line with the keys."""
  cells = [list(records[0]), *([cell(value) for value in r.values()] for r in records)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
  return "\n".join(map(line, cells))


def cell(value: Any) -> str:
  """Return a value as text, floats with four decimals or, if they are small, two digits."""
  if not isinstance(value, float):
    return str(value)
  return f"{value:.4f}" if 1e-3 <= abs(value) or not value else f"{value:.1e}"
