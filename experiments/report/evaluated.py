"""Evaluated runs, in groups that may be compared."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from experiments.runs import results, store
from experiments.settings import algorithms, schema


class Evaluated(NamedTuple):
  """A run with the results that `experiments.evaluate` wrote."""

  folder: pathlib.Path
  settings: dict[str, Any]  # of training and evaluation, without the arms
  arm: dict[str, Any]  # the settings of its arm
  curve: results.Curve
  environment: dict[str, Any]  # of training
  checksums: dict[str, str] | None = None  # of the data; runs of earlier versions have none


def groups_of(
  folders: Sequence[pathlib.Path], name: str
) -> tuple[list[list[Evaluated]], list[pathlib.Path]]:
  """Return (the runs with a file NAME.json in groups, the runs whose file is damaged).

  A group has the same settings and data, and the order of algorithms.ALL. Runs on different data
  have other tasks, even if the words of their protocols are the same.
  """
  found: dict[str, list[Evaluated]] = {}
  damaged: list[pathlib.Path] = []
  for folder in folders:
    file = folder / f"{name}.json"
    if store.diverged(folder).exists():
      continue  # `diverged_among` finds it
    if not file.exists():
      logging.warning("%s has no %s.json: left out. Run experiments.evaluate.", folder, name)
      continue
    try:
      settings, (curve,) = results.read_json(file)
    except ValueError as error:
      logging.error("%s is left out: %s", folder, error)
      damaged.append(folder)
      continue
    arm, about = settings.pop("arms")[curve.algorithm], store.read(folder)[1]
    sums = about.get("checksums")
    one = Evaluated(folder, settings, arm, curve, about["environment"], sums)
    members = found.setdefault(json.dumps([settings, sums], sort_keys=True), [])
    _check_alike(one, members)
    members.append(one)
  if not found:
    lost = sum(store.diverged(folder).exists() for folder in folders)
    raise ValueError(
      f"No run has {name}.json, {lost} of {len(folders)} diverged in training. Run "
      "experiments.evaluate on the others first."
    )
  order = lambda one: (algorithms.ALL.index(one.curve.algorithm), one.curve.seed)
  return [sorted(members, key=order) for members in found.values()], damaged


def _check_alike(one: Evaluated, members: Sequence[Evaluated]) -> None:
  """Raise ValueError if a member has the same algorithm, with the same seed or another arm."""
  name, seed = one.curve.algorithm, one.curve.seed
  for other in (other for other in members if other.curve.algorithm == name):
    if other.curve.seed == seed:
      raise ValueError(
        f"{other.folder} and {one.folder} are both runs of {name} from seed {seed}: wanted one "
        "curve an algorithm and seed. Leave one of them out."
      )
    if schema.without_search(other.arm) != schema.without_search(one.arm):
      raise ValueError(
        f"{other.folder} and {one.folder} are runs of one arm with unlike settings, {other.arm} "
        f"and {one.arm}: no mean over them has a meaning. Leave one of them out."
      )


def diverged_among(
  folders: Sequence[pathlib.Path], members: Sequence[Evaluated]
) -> dict[pathlib.Path, str]:
  """Return the diverged runs with the settings and data of `members`: folder -> "maml, seed 3"."""
  own = {k: v for k, v in members[0].settings.items() if k not in ("split", "freeze")}
  found = {}
  for folder in folders:
    if store.diverged(folder).exists():
      run, about = store.read(folder)
      settings = {k: v for k, v in about["config"].items() if k != "arms"}
      same_data = about.get("checksums") == members[0].checksums
      if same_data and settings | {"protocol": about["protocol"]} == own:
        found[folder] = f"{run.arm}, seed {run.seed}"
  return found


def heading(settings: Mapping[str, Any]) -> str:
  """Return the data and the number of shots in words."""
  protocol = settings["protocol"]
  shots = protocol["shots"]
  return f"{protocol['data']}, {shots} shot{'s' * (shots != 1)}"


def report_step(settings: Mapping[str, Any]) -> int:
  """Return the index into `Curve.steps` of the step after which arms are compared."""
  return list(settings["adapt_steps"]).index(settings["report_step"])


def unit(settings: Mapping[str, Any], usual: str = "episodes") -> str:
  """Return the name of a curve's columns, in the plural."""
  return settings.get("evaluation", {"over": usual})["over"]
