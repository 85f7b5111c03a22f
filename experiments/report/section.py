"""One section of the report: tables and pictures of comparable runs."""

import collections
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import html
from experiments.report.evaluated import Evaluated, heading, report_step, unit
from experiments.report.pictures import adaptation, sigma_plots
from experiments.report.tables import comparison, cost, sigma
from experiments.runs import files, results
from experiments.settings import algorithms


def write(
  out: pathlib.Path, number: int, members: Sequence[Evaluated], diverged: Sequence[str]
) -> str:
  """Write the tables and pictures of a section to `out`, and return its HTML.

  Args:
    out: the folder of the report.
    number: the number of the section.
    members: the runs.
    diverged: the runs that diverged in training, in words. They are part of no mean.
  """
  settings, curves = members[0].settings, [one.curve for one in members]
  title = f"<h2>{number}. {html.text(heading(settings))}</h2>"
  about = facts(members, diverged)
  parts = [title + facts_list(about)]

  tables = [f"Judged on: {about['judged on']}"]
  if diverged:
    tables.append(f"Diverged in training, in no mean: {'; '.join(diverged)}")
  at = report_step(settings)
  tables += comparison.tables(curves, at, unit(settings))
  own = {one.curve.algorithm: one.arm for one in members}
  learned = [curve for curve in curves if algorithms.learns_sigma(curve.algorithm)]
  if learned:
    tables.append(sigma.sigma_table(learned))
  tables += [*freezing(members, at), cost.cost_table(curves, settings["meta_batch"], own)]
  tables.append(cost.settings_table(own))
  with files.atomic(out / f"tables_{number}.md") as temporary:
    temporary.write_text("\n\n".join(t.rstrip() for t in tables) + "\n", encoding="utf-8")
  parts += map(html.tables, tables)

  file = out / f"adaptation_{number}.png"
  adaptation.adaptation_curves(file, curves, unit(settings, "tasks"))
  parts.append(html.picture(file, "against adaptation steps"))
  if learned:
    for draw in (sigma_plots.sigma_per_module, sigma_plots.sigma_heat_map):
      file = out / f"{draw.__name__}_{number}.png"
      draw(file, learned)
      parts.append(html.picture(file, draw.__name__.replace("_", " ")))
  return "\n".join(parts)


def facts_list(about: Mapping[str, Any]) -> str:
  """Return facts as a list in HTML."""
  terms = "".join(f"<dt>{html.text(k)}</dt><dd>{html.text(v)}</dd>" for k, v in about.items())
  return f"<dl>{terms}</dl>"


def facts(members: Sequence[Evaluated], diverged: Sequence[str]) -> dict[str, Any]:
  """Return the facts at the head of a section."""
  settings = members[0].settings
  searched = settings["split"] == "validation" and any(one.arm["trials"] for one in members)
  chosen = ", on which settings were chosen" if searched else ""
  seeds = sorted({one.curve.seed for one in members})
  below = f"modules with sigma below {results.number(settings['freeze'])}"
  return settings["protocol"] | {
    "judged on": f"{settings['split']} tasks{chosen}",
    "training": f"{settings['meta_steps']} meta-steps of {settings['meta_batch']} tasks",
    "seeds": ", ".join(map(str, seeds)),
    "frozen": below if settings["freeze"] else "none",
    "diverged, in no mean": "; ".join(diverged) or "none",
    "software and device": "; and ".join(sorted({_listed(one.environment) for one in members})),
  }


def _listed(environment: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in environment.items())


def freezing(members: Sequence[Evaluated], step: int) -> list[str]:
  """Return tables of the cost of freezing modules, for each algorithm and split with such files."""
  tables = []
  names = dict.fromkeys(one.curve.algorithm for one in members)
  read = lambda file: results.read_json(file)[1][0]
  for name, split in itertools.product(names, ("validation", "test")):
    folders = [one.folder for one in members if one.curve.algorithm == name]
    frozen: dict[float, list[results.Curve]] = collections.defaultdict(list)
    for file in (file for folder in folders for file in folder.glob(f"{split}-freeze*.json")):
      frozen[float(file.stem.partition("-freeze")[2])].append(read(file))
    if frozen:
      if missing := [str(f) for f in folders if not (f / f"{split}.json").exists()]:
        raise ValueError(
          f"Modules were frozen for {split} tasks, and without any frozen nothing was evaluated in "
          f"{', '.join(missing)}. Run experiments.evaluate --split={split} on them."
        )
      whole = [read(folder / f"{split}.json") for folder in folders]
      title = "Chosen on: validation tasks" if split == "validation" else "Reported on: test tasks"
      tables += [title, sigma.freezing_table(whole, frozen, step, unit(members[0].settings))]
  return tables
