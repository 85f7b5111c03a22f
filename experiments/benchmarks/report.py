"""Measurements as JSON lines in a file and as a plain-text table."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import shrinkmeta as sm
from experiments.runs import files
from experiments.settings import machine

Record = dict[str, Any]


def environment() -> Record:
  """Return the device and the versions, which are stored with every measurement."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "cpu_count": machine.cores(),
    "jax": jax.__version__,
    "shrinkmeta": sm.__version__,
  }


def append(path: pathlib.Path, *records: Mapping[str, Any]) -> None:
  """Append each record to the file as one line; without records, check that it is writable."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a", encoding="utf-8") as file:
    for record in records:
      file.write(files.strict_json(record) + "\n")


def cell(value: Any) -> str:
  """Return a value as short text; a spread becomes median [smallest, largest]."""
  if isinstance(value, Mapping) and "median" in value:
    return "{} [{}, {}]".format(*(cell(value[key]) for key in ("median", "low", "high")))
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Return the rows as plain text, with one column for each key of any row.

  >>> print(table([{"tasks": 1, "seconds": 0.25}, {"tasks": 16, "slope": 0.98}]))
  tasks  seconds  slope
      1     0.25      -
     16        -   0.98
  """
  columns = list(dict.fromkeys(key for row in rows for key in row))
  cells = [columns, *([cell(row.get(key)) for key in columns] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  return "\n".join(
    "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells
  )
