"""The record of a run, `Curve`, and the files of records.

Letters in shapes: S adaptation steps recorded, E test episodes, K seeds. All algorithms and seeds
have the same E episodes in the same order, so differences between algorithms are paired.
"""

import csv
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.runs.files import Path, atomic

FORMAT = "shrinkmeta.experiments.results/1"
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no such numbers


class Curve(NamedTuple):
  """One algorithm, trained from one seed and adapted to E unseen tasks.

  `history` holds training curves of equal length. `sigma_plots.sigma_history` reads its entries
  "step" (meta-steps) and "sigma/<module>".
  """

  algorithm: str
  seed: int
  steps: np.ndarray  # [S] adaptation steps, ascending integers
  accuracy: np.ndarray  # [S, E] share of val examples recognised, 0 to 1; nan in regression
  nll: np.ndarray  # [S, E] mean val negative log-likelihood per example, in nats
  sigma: dict[str, float]  # module -> sigma_m; inf: no prior, 0: frozen
  moved: dict[str, float]  # module -> root mean square of theta - phi, after the last step
  sizes: dict[str, int]  # module -> number of parameters
  seconds: dict[str, float]  # stage (compile, train, adapt) -> seconds
  history: dict[str, list[float]]  # name -> training curve


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
  """Write algorithm, seed, episode, step, accuracy and nll: a line for each episode and step."""
  with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("algorithm", "seed", "episode", "step", "accuracy", "nll"))
    for i, curve in enumerate(curves):
      curve = check(curve, f"curves[{i}]")
      for e, s in np.ndindex(curve.accuracy.shape[::-1]):
        writer.writerow(
          (curve.algorithm, curve.seed, e, curve.steps[s], curve.accuracy[s, e], curve.nll[s, e])
        )


def write_json(
  path: Path, config: Mapping[str, Any], curves: Sequence[Curve], environment: Mapping[str, Any]
) -> None:
  """Write the config, the environment and the curves as strict JSON, one line for each curve.

  Numbers that are not finite become the strings "inf", "-inf" and "nan". The file appears whole or
  not at all. An older file stays until the new one is complete.

  Args:
    path: the file.
    config: numbers, strings, None, arrays, dataclasses, and lists and mappings of these. Convert an
      ml_collections.ConfigDict by `.to_dict()`.
    curves: curves of any algorithms and seeds.
    environment: the result of `files.environment()`.
  """
  head = {
    "format": FORMAT,
    "config": config,
    "seeds": sorted({c.seed for c in curves}),
    "environment": environment,
  }
  dump = lambda value, where: json.dumps(_encode(value, where), allow_nan=False, ensure_ascii=False)
  lines = [f"{json.dumps(key)}: {dump(value, key)}" for key, value in head.items()]
  rows = [dump(check(c, f"curves[{i}]"), f"curves[{i}]") for i, c in enumerate(curves)]
  text = "{\n" + ",\n".join(lines) + ',\n"curves": [\n' + ",\n".join(rows) + "\n]\n}\n"
  with atomic(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> tuple[dict[str, Any], list[Curve]]:
  """Return (config, curves) of a file; tuples and arrays of the config have become lists.

  Raises:
    ValueError: a field is missing, or has the wrong type or shape. The message names it.
  """

  def refuse(literal: str) -> Any:
    raise ValueError(f"the literal {literal} is not JSON")

  advice = f"Wanted a file written by write_json ({FORMAT})."
  name = str(path)  # the whole path: all runs use the same names
  try:
    document = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"), parse_constant=refuse)
  except ValueError as error:
    raise ValueError(f"{name} is not JSON: {error}. {advice}") from error
  if not isinstance(document, dict):
    raise ValueError(f"{name} holds a {type(document).__name__}, no object. {advice}")
  if document.get("format") != FORMAT:
    raise ValueError(f"{name}: format is {document.get('format')!r}. {advice}")
  for field, kind in (("config", dict), ("curves", list)):
    if not isinstance(document.get(field), kind):
      got = type(document[field]).__name__ if field in document else "nothing"
      raise ValueError(f"{name}: {field} is a {kind.__name__}; got {got}. {advice}")
  curves = []
  for i, entry in enumerate(_decode(document["curves"])):
    where = f"{name}: curves[{i}]"
    fields = set(entry) if isinstance(entry, dict) else set()
    if wrong := sorted(fields.symmetric_difference(Curve._fields)):
      raise ValueError(f"{where}: missing or unknown {', '.join(wrong)}. {advice}")
    curves.append(check(Curve(**entry), where))
  return _decode(document["config"]), curves


def is_there(file: pathlib.Path) -> bool:
  """Return whether a file has curves; a damaged file counts as missing, with a warning."""
  if not file.exists():
    return False
  try:
    read_json(file)
  except ValueError as error:
    logging.warning("%s Making it again.", error)
    return False
  return True


def number(value: float) -> str:
  """Return a short text for a number, from which `float` makes the same number again."""
  text = f"{value:g}"  # six digits
  return text if float(text) == value else repr(value)


def check(curve: Curve, where: str) -> Curve:
  """Return the curve with numpy arrays, or raise ValueError that names the wrong field."""

  def refuse(field: str, wanted: str, came: object) -> ValueError:
    return ValueError(f"{where}: {field} is {wanted}; got {came}. Correct it or drop the curve.")

  def array(field: str, ndim: int, kinds: str) -> np.ndarray:
    wanted = f"an array of numbers with {ndim} axes" if ndim > 1 else "a list of integers"
    try:
      value = np.asarray(getattr(curve, field))
    except ValueError as error:  # rows of unequal length
      raise refuse(field, wanted, "rows of unequal length") from error
    if value.dtype.kind not in kinds or value.ndim != ndim or not value.size:
      raise refuse(field, wanted, f"shape {value.shape} of {value.dtype}")
    return value

  if not isinstance(curve.algorithm, str):
    raise refuse("algorithm", "a string", repr(curve.algorithm))
  if not _is_number(curve.seed, integer=True):
    raise refuse("seed", "an integer", repr(curve.seed))
  steps = array("steps", 1, "iu")
  accuracy, nll = array("accuracy", 2, "iuf"), array("nll", 2, "iuf")
  if steps[0] < 0 or np.any(np.diff(steps) <= 0):
    raise refuse("steps", "ascending and not negative", steps.tolist())
  for field, value in (("accuracy", accuracy), ("nll", nll)):
    if value.shape != (len(steps), accuracy.shape[1]):
      raise refuse(field, f"[{len(steps)}, {accuracy.shape[1]}], steps and episodes", value.shape)
  for field in ("sigma", "moved", "sizes", "seconds", "history"):
    value = getattr(curve, field)
    numbers = isinstance(value, Mapping) and all(
      isinstance(k, str)
      and (
        isinstance(v, Sequence) and all(map(_is_number, v))
        if field == "history"
        else _is_number(v, integer=field == "sizes")
      )
      for k, v in value.items()
    )
    if not numbers:
      wanted = "lists of numbers" if field == "history" else "numbers"
      raise refuse(field, f"a dictionary from names to {wanted}", repr(value)[:80])
  return curve._replace(steps=steps, accuracy=accuracy, nll=nll)


def _is_number(value: object, integer: bool = False) -> bool:
  kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
  return isinstance(value, kinds) and not isinstance(value, bool)


def _encode(value: Any, where: str) -> Any:
  """Return `value` in the types of JSON; error messages call it `where`."""
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    value = np.asarray(value).tolist()
  if isinstance(value, float) and not math.isfinite(value):
    return str(float(value))
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
    value = dict(zip(names, value, strict=True))
  if isinstance(value, Mapping):
    return {str(k): _encode(v, f"{where}.{k}") for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
  raise ValueError(
    f"{where} is data (numbers, strings, lists, mappings); got a "
    f"{type(value).__name__}. Store its name or its settings."
  )


def _decode(value: Any) -> Any:
  """Turn the strings "inf", "-inf" and "nan" back into numbers."""
  if isinstance(value, dict):
    return {k: _decode(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_decode(v) for v in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value
