"""What `evaluate` found in the folders of runs: one self-contained HTML page, PNGs, tables.

    python -m experiments.report runs/small_data runs/sinusoid --out=report

Runs are compared where protocol and settings are the same; others have sections of their own.
"""

import base64
import collections
import copy
import html
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments.report.pictures import adaptation, sigma_plots
from experiments.report.tables import summaries
from experiments.runs import learners, results, store
from experiments.settings import schema

_OUT = flags.DEFINE_string("out", "report", "Folder of index.html and the pictures.")
_NAME = flags.DEFINE_string(
  "evaluation", "test", "Which file of the runs: test, validation, or such as test-freeze0.1."
)
_OWN_FILES = r"tables_\d+\.md|(adaptation|sigma_per_module|sigma_heat_map|data)_\d+\.png"
_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 62rem; margin: 2rem auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } img { max-width: 100% } dt { font-weight: bold }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0 }
"""


class Evaluated(NamedTuple):
  """What `evaluate` found of one run."""

  folder: pathlib.Path
  settings: dict[str, Any]  # of training and evaluation, those of other arms left out
  arm: dict[str, Any]  # the settings of its arm
  curve: results.Curve
  environment: dict[str, Any]  # of training


def sections_of(folders: Sequence[pathlib.Path], name: str) -> list[list[Evaluated]]:
  """Runs that may be compared, in the order of learners.ALL; a list of them for each section."""
  found: dict[str, list[Evaluated]] = {}
  for folder in folders:
    file = folder / f"{name}.json"
    if store.diverged(folder).exists():
      continue  # `section` tells
    if not file.exists():
      logging.warning("%s has no %s.json: left out. Run experiments.evaluate.", folder, name)
      continue
    settings, (curve,) = results.read_json(file)
    arm = settings.pop("arms")[curve.algorithm]
    one = Evaluated(folder, settings, arm, curve, store.read(folder)[1]["environment"])
    members = found.setdefault(json.dumps(settings, sort_keys=True), [])
    for other in (other for other in members if other.curve.algorithm == curve.algorithm):
      if other.curve.seed == curve.seed:
        raise ValueError(
          f"{other.folder} and {folder} are both runs of {curve.algorithm} from seed {curve.seed}: "
          "wanted one curve an algorithm and seed. Leave one of them out."
        )
      if schema.without_search(other.arm) != schema.without_search(arm):
        raise ValueError(
          f"{other.folder} and {folder} are runs of one arm with unlike settings, {other.arm} and "
          f"{arm}: no mean over them has a meaning. Leave one of them out."
        )
    members.append(one)
  if not found:
    lost = sum(store.diverged(folder).exists() for folder in folders)
    raise ValueError(
      f"No run has {name}.json, {lost} of {len(folders)} diverged in training. Run "
      "experiments.evaluate on the others first."
    )
  order = lambda one: (learners.ALL.index(one.curve.algorithm), one.curve.seed)
  return [sorted(members, key=order) for members in found.values()]


def diverged_among(
  folders: Sequence[pathlib.Path], members: Sequence[Evaluated]
) -> dict[pathlib.Path, str]:
  """Of a section's runs those that have no result: folder -> "maml, seed 3"."""
  own = {k: v for k, v in members[0].settings.items() if k not in ("split", "freeze")}
  found = {}
  for folder in folders:
    if store.diverged(folder).exists():
      run, about = store.read(folder)
      settings = {k: v for k, v in about["config"].items() if k != "arms"}
      if settings | {"protocol": about["protocol"]} == own:
        found[folder] = f"{run.arm}, seed {run.seed}"
  return found


def as_html(text: str) -> str:
  """Paragraphs and Markdown tables, as `summaries` makes them."""
  parts = []
  for block in text.strip().split("\n\n"):
    lines = block.splitlines()
    if not lines[0].startswith("|"):
      parts.append(f"<p>{html.escape(block)}</p>")
      continue
    cells = [[html.escape(c.strip()) for c in line.strip("|").split("|")] for line in lines]
    rows = [
      "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in row) + "</tr>"
      for row, tag in zip([cells[0], *cells[2:]], ["th"] + ["td"] * len(cells), strict=False)
    ]
    parts.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
  return "\n".join(parts)


def _text(value: object) -> str:
  return html.escape(str(value))


def _picture(file: pathlib.Path, title: str) -> str:
  data = base64.b64encode(file.read_bytes()).decode()
  return f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">'


def freezing(members: Sequence[Evaluated], step: int) -> list[str]:
  """For each algorithm and split with files of frozen modules, what freezing them loses."""
  tables = []
  names = dict.fromkeys(one.curve.algorithm for one in members)
  for name, split in itertools.product(names, ("validation", "test")):
    folders = [one.folder for one in members if one.curve.algorithm == name]
    read = lambda file: results.read_json(file)[1][0]
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
      tables += [title, summaries.freezing_table(whole, frozen, step)]
  return tables


def over_data(out: pathlib.Path, groups: Sequence[Sequence[Evaluated]]) -> str:
  """Pictures against data, where sections differ in shots or training alphabets alone; modules."""
  parts, learned = [], {}
  for number, members in enumerate(groups, 1):
    settings = members[0].settings
    own = [one.curve for one in members if results.learns_sigma(one.curve.algorithm)]
    if own:
      learned[f"{number}. {_heading(settings)}"] = own
  for key, label in (("shots", "Examples of a class"), ("train_alphabets", "Training alphabets")):
    series: dict[str, dict[float, Sequence[Evaluated]]] = collections.defaultdict(dict)
    for members in groups:
      settings = copy.deepcopy(members[0].settings)
      problem = settings["problem"]
      amount = problem.get("shape", problem).pop(key, None)
      if isinstance(amount, int):
        del settings["protocol"]  # tells the amount in words
        if amount in (same := series[json.dumps(settings, sort_keys=True)]):
          raise ValueError(
            f"{same[amount][0].folder} and {members[0].folder} differ in their protocol alone, not "
            "in their settings: were they made by one version? Leave one of them out."
          )
        same[amount] = members
    for found in (found for found in series.values() if len(found) > 1):
      settings = next(iter(found.values()))[0].settings
      file = out / f"data_{len(parts)}.png"
      curves = {amount: [one.curve for one in found[amount]] for amount in found}
      names = [{curve.algorithm for curve in group} for group in curves.values()]
      if lacking := set.union(*names) - (shared := set.intersection(*names)):
        logging.warning(
          "Against %s, %s left out: no run at every one of %s",
          label.lower(),
          ", ".join(sorted(lacking)),
          sorted(curves),
        )
        curves = {
          amount: [c for c in group if c.algorithm in shared] for amount, group in curves.items()
        }
        if not shared:
          continue
      adaptation.data_curves(file, curves, _report_step(settings), label)
      parts.append(f"<h2>{_text(settings['table'])}</h2>{_picture(file, label)}")
  if learned:
    parts.append("<h2>Modules found</h2>" + as_html(summaries.found_modules(learned)))
  return "\n".join(parts)


def _heading(settings: Mapping[str, Any]) -> str:
  protocol = settings["protocol"]
  shots = protocol["shots"]
  return f"{protocol['data']}, {shots} shot{'s' * (shots != 1)}"


def _listed(environment: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in environment.items())


def _report_step(settings: Mapping[str, Any]) -> int:
  return list(settings["adapt_steps"]).index(settings["report_step"])


def section(
  out: pathlib.Path, number: int, members: Sequence[Evaluated], diverged: Sequence[str]
) -> str:
  """Tables and pictures of runs that may be compared.

  Args:
    diverged: runs in training, which no mean holds.
  """
  settings, curves = members[0].settings, [one.curve for one in members]
  batch = settings["meta_batch"]
  searched = settings["split"] == "validation" and any(one.arm["trials"] for one in members)
  chosen = ", on which settings were chosen" if searched else ""
  facts = settings["protocol"] | {
    "judged on": f"{settings['split']} tasks{chosen}",
    "training": f"{settings['meta_steps']} meta-steps of {batch} tasks",
    "seeds": ", ".join(map(str, sorted({curve.seed for curve in curves}))),
    "frozen": f"modules with sigma below {settings['freeze']:g}" if settings["freeze"] else "none",
    "diverged in training, in no mean": "; ".join(diverged) or "none",
    "on": "; and ".join(sorted({_listed(one.environment) for one in members})),
  }
  terms = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items())
  parts = [f"<h2>{number}. {_text(_heading(settings))}</h2><dl>{terms}</dl>"]

  tables = [f"Judged on: {facts['judged on']}"]
  if diverged:
    tables.append(f"Diverged in training, in no mean: {'; '.join(diverged)}")
  tables.append(summaries.accuracy_table(curves))
  if results.has(curves, "accuracy"):
    tables.append(summaries.overfitting_table(curves))
  names = list(results.group_by_algorithm(curves))
  at = _report_step(settings)
  for reference in [name for name in names if results.learns_sigma(name)]:
    if len(names) > 1:
      tables.append(summaries.paired_table(curves, reference, at))
  own = {one.curve.algorithm: one.arm for one in members}
  learned = [curve for curve in curves if results.learns_sigma(curve.algorithm)]
  if learned:
    tables.append(summaries.sigma_table(learned))
  tables += [*freezing(members, at), summaries.cost_table(curves, batch, own)]
  tables.append(summaries.settings_table(own))
  with results.atomic(out / f"tables_{number}.md") as temporary:
    temporary.write_text("\n\n".join(t.rstrip() for t in tables) + "\n", encoding="utf-8")
  parts += map(as_html, tables)
  file = out / f"adaptation_{number}.png"
  adaptation.adaptation_curves(file, curves)
  parts.append(_picture(file, "against adaptation steps"))

  if learned:
    for draw in (sigma_plots.sigma_per_module, sigma_plots.sigma_heat_map):
      file = out / f"{draw.__name__}_{number}.png"
      draw(file, learned)
      parts.append(_picture(file, draw.__name__.replace("_", " ")))
  return "\n".join(parts)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.report runs/small_data")
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  try:
    folders = store.find(argv[1:])
    groups = sections_of(folders, _NAME.value)
    diverged = [diverged_among(folders, members) for members in groups]
    earlier = [file for file in out.iterdir() if re.fullmatch(_OWN_FILES, file.name)]
    written = {file: file.stat().st_mtime_ns for file in earlier}
    sections = [
      section(out, i, members, [*own.values()])
      for i, (members, own) in enumerate(zip(groups, diverged, strict=True), 1)
    ]
    sections.append(over_data(out, groups))
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  page = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>shrinkmeta: report</title>'
    f"<style>{_STYLE}</style><h1>Report</h1>\n" + "\n".join(sections) + "\n</html>\n"
  )
  with results.atomic(out / "index.html") as temporary:
    temporary.write_text(page, encoding="utf-8")
  for file, time in written.items():
    if file.stat().st_mtime_ns == time:  # of an earlier report that had more sections
      file.unlink()
  for folder in set(filter(lambda f: store.diverged(f).exists(), folders)).difference(*diverged):
    logging.warning("%s diverged in training, and no other run is like it: left out.", folder)
  logging.info("The report is %s", out / "index.html")
