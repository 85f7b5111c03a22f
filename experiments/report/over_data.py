"""Results against the amount of data, for sections that differ in nothing else."""

import collections
import copy
import json
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from experiments.report import html
from experiments.report.evaluated import Evaluated, heading, report_step
from experiments.report.pictures import adaptation
from experiments.report.tables import sigma
from experiments.runs.results import Curve
from experiments.settings import algorithms

_AMOUNTS = {"shots": "Examples of a class", "train_alphabets": "Training alphabets"}


def write(out: pathlib.Path, groups: Sequence[Sequence[Evaluated]]) -> str:
  """Write pictures against the amount of data; return them and the modules found in HTML."""
  parts = []
  for key, label in _AMOUNTS.items():
    for found in _series(groups, key):
      if curves := _common(found, label):
        settings = next(iter(found.values()))[0].settings
        file = out / f"data_{len(parts)}.png"
        adaptation.data_curves(file, curves, report_step(settings), label)
        parts.append(f"<h2>{html.text(settings['table'])}</h2>{html.picture(file, label)}")
  learned: dict[str, list[Curve]] = {}
  for number, members in enumerate(groups, 1):
    own = [one.curve for one in members if algorithms.learns_sigma(one.curve.algorithm)]
    if own:
      learned[f"{number}. {heading(members[0].settings)}"] = own
  if learned:
    parts.append("<h2>Modules found</h2>" + html.tables(sigma.found_modules(learned)))
  return "\n".join(parts)


def _series(
  groups: Sequence[Sequence[Evaluated]], key: str
) -> list[dict[float, Sequence[Evaluated]]]:
  """Return {amount: section}, where sections differ only in the setting `key` of the problem."""
  series: dict[str, dict[float, Sequence[Evaluated]]] = collections.defaultdict(dict)
  several: set[str] = set()  # series in which an amount has sections on different data
  for members in groups:
    settings = copy.deepcopy(members[0].settings)
    problem = settings["problem"]
    amount = problem.get("shape", problem).pop(key, None)
    if isinstance(amount, int):
      del settings["protocol"]  # it has the amount in words
      name = json.dumps(settings, sort_keys=True)
      if amount in (same := series[name]) and same[amount][0].checksums != members[0].checksums:
        logging.warning(
          "%s and %s were trained on different data: no picture against %s.",
          same[amount][0].folder,
          members[0].folder,
          key,
        )
        several.add(name)
      elif amount in same:
        raise ValueError(
          f"{same[amount][0].folder} and {members[0].folder} differ in their protocol alone, not "
          "in their settings: were they made by one version? Leave one of them out."
        )
      same[amount] = members
  return [found for name, found in series.items() if len(found) > 1 and name not in several]


def _common(found: Mapping[float, Sequence[Evaluated]], label: str) -> dict[float, list[Curve]]:
  """Return the curves of the algorithms that have runs at every amount; {} if there are none."""
  curves = {amount: [one.curve for one in found[amount]] for amount in found}
  names = [{curve.algorithm for curve in group} for group in curves.values()]
  shared = set.intersection(*names)
  if lacking := set.union(*names) - shared:
    logging.warning(
      "Against %s, %s left out: no run at every one of %s",
      label.lower(),
      ", ".join(sorted(lacking)),
      sorted(curves),
    )
  if not shared:
    return {}
  return {amount: [c for c in group if c.algorithm in shared] for amount, group in curves.items()}
