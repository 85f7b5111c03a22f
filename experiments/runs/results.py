"""What a run of an experiment found: its record and its files.

Letters in shapes: S adaptation steps recorded, E test episodes, K seeds. Every algorithm and every
seed meets the same E episodes in the same order, so differences between algorithms are paired.
"""

import collections
import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from absl import logging
from scipy import stats

import shrinkmeta as sm

Path: TypeAlias = str | os.PathLike[str]

FORMAT = "shrinkmeta.experiments.results/1"
_PACKAGES = ("shrinkmeta", "jax", "jaxlib", "flax", "optax", "numpy")
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no such numbers


class Curve(NamedTuple):
  """One algorithm, trained from one seed and adapted to E unseen tasks.

  `history` holds training curves of equal length. `sigma_plots.sigma_history` reads "step"
  (meta-steps) and "sigma/<module>" from it.
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


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Mean and half width of its Student t interval over episodes.

      mean ± t_{E-1, (1 + level) / 2} · s / √E,   s² = Σ_e (v_e − mean)² / (E − 1)

  Args:
    values: [E], or [K, E] for K seeds that met the same episodes: then v_e is the mean over seeds.
      So the interval speaks of new tasks for the networks trained here, not of new seeds.
    level: coverage.

  Returns:
    (mean, half width). The half width is inf for E = 1, and nan where a value is not finite.
  """
  values = np.asarray(values, float)
  if values.ndim not in (1, 2) or not values.size:
    raise ValueError(
      f"interval takes values [E] or [seeds, E], E >= 1; got shape {values.shape}. "
      "Index one adaptation step first."
    )
  if not 0 < level < 1:
    raise ValueError(f"level is a coverage between 0 and 1; got {level}. For 95 % pass 0.95.")
  with np.errstate(invalid="ignore"):  # inf − inf, for a run that diverged
    episodes = values.mean(0) if values.ndim == 2 else values
    mean = float(episodes.mean())
    if episodes.size == 1:
      return mean, math.inf
    half = stats.t.ppf((1 + level) / 2, episodes.size - 1) * stats.sem(episodes)
  return mean, float(half)


def network_order(modules: Iterable[str]) -> list[str]:
  """Sorts conv_0, norm_0, conv_1, …, head: by number, norms after what they normalise.

  Names without a number come last. jax sorts dictionaries by key, so their order says nothing.
  """

  def key(name: str) -> tuple[Any, ...]:
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", name))
    return not numbers, numbers, "norm" in name.lower(), name

  return sorted(modules, key=key)


def group_by_algorithm(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
  """Algorithm -> its curves, one a seed, in order of first appearance; checked to be comparable."""
  if not curves:
    raise ValueError("Wanted at least one Curve; got none.")
  groups: dict[str, list[Curve]] = collections.defaultdict(list)
  checked = [check(curve, f"curves[{i}]") for i, curve in enumerate(curves)]
  first = checked[0]
  for curve in checked:
    name = f"{curve.algorithm}, seed {curve.seed}"
    if not np.array_equal(curve.steps, first.steps) or curve.accuracy.shape != first.accuracy.shape:
      raise ValueError(
        "Curves are compared at the same steps on the same episodes; got steps "
        f"{first.steps.tolist()}, {first.accuracy.shape[1]} episodes for {first.algorithm}, and "
        f"{curve.steps.tolist()}, {curve.accuracy.shape[1]} episodes for {name}. "
        "Rerun one with the other's config."
      )
    if any(curve.seed == other.seed for other in groups[curve.algorithm]):
      raise ValueError(f"Wanted one curve an algorithm and seed; got two of {name}. Drop one.")
    groups[curve.algorithm].append(curve)
  return dict(groups)


def average_seeds(curves: Sequence[Curve], field: str) -> dict[str, np.ndarray]:
  """Algorithm -> `field` ("accuracy" or "nll") averaged over its seeds, [S, E]."""
  groups = group_by_algorithm(curves)
  return {a: np.mean([getattr(c, field) for c in group], 0) for a, group in groups.items()}


def learns_sigma(algorithm: str) -> bool:
  """True for the rows of the table that learn one sigma a module, of a prior."""
  row = sm.FAMILY.get(algorithm)
  return row is not None and row.sigma == "learned" and row.prior


def has(curves: Sequence[Curve], field: str) -> bool:
  """Whether any curve has numbers of `field`: in regression there is no accuracy."""
  return any(not np.isnan(np.asarray(getattr(curve, field), float)).all() for curve in curves)


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
  """Writes algorithm, seed, episode, step, accuracy, nll: one row an episode and step."""
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
  """Writes everything needed to read a result later, as strict JSON, a curve a line.

  Numbers that are not finite become the strings "inf", "-inf" and "nan". The file appears whole or
  not at all, and a file that was there before stays until then.

  Args:
    path: where to.
    config: numbers, strings, None, arrays, dataclasses, and lists and mappings of these. Of an
      ml_collections.ConfigDict pass `.to_dict()`.
    curves: any algorithms and seeds.
    environment: as from `environment()`.
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
  """The (config, curves) that `write_json` wrote; tuples and arrays of the config are lists now.

  Raises:
    ValueError: names the field that is missing, of the wrong kind or of the wrong shape.
  """

  def refuse(literal: str) -> Any:
    raise ValueError(f"the literal {literal} is not JSON")

  advice = f"Wanted a file written by write_json ({FORMAT})."
  name = str(path)  # whole: among many runs the name alone tells nothing
  try:
    document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
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
  """Whether curves are in a file already; a damaged one is to be made again."""
  if not file.exists():
    return False
  try:
    read_json(file)
  except ValueError as error:
    logging.warning("%s Making it again.", error)
    return False
  return True


def environment() -> dict[str, Any]:
  """Versions and device of this process, for `write_json`."""

  def version(package: str) -> str:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return "not installed"  # e.g. shrinkmeta run from its checkout

  device = jax.devices()[0]
  return {
    "python": platform.python_version(),
    **{package: version(package) for package in _PACKAGES},
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "system": f"{platform.system()} {platform.machine()}",
  }


def write_document(path: Path, content: Mapping[str, Any]) -> None:
  """A JSON file of `content` and `environment()`, whole or not at all."""
  text = strict_json({**content, "environment": environment()}, indent=2)
  with atomic(path) as temporary:
    temporary.write_text(text + "\n", encoding="utf-8")


def strict_json(content: Mapping[str, Any], indent: int | None = None) -> str:
  """JSON that every reader takes: a number that is not finite, which JSON lacks, becomes null."""

  def clean(value: Any) -> Any:
    if isinstance(value, float):
      return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
      return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

  return json.dumps(clean(content), indent=indent, allow_nan=False)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that takes the place of `path` once the body is done, or is removed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside its target: os.replace is atomic within one file system only.
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def check(curve: Curve, where: str) -> Curve:
  """The curve with numpy arrays, or a ValueError that names the field."""

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
  """`value` in the types of JSON; `where` names it in errors."""
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    value = np.asarray(value).tolist()
  if isinstance(value, float) and not math.isfinite(value):
    return str(float(value))
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
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
  """Inverse of `_encode` on non-finite numbers: a string "inf" is always the number."""
  if isinstance(value, dict):
    return {k: _decode(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_decode(v) for v in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value
