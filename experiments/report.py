"""One self-contained HTML page, and its PNGs, of what `evaluate` found in the folders of runs.

python -m experiments.report runs/small_data runs/sinusoid --out=report
"""

import base64
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments import plots, results, runs

_OUT = flags.DEFINE_string("out", "report", "Folder of index.html and the pictures.")
_NAME = flags.DEFINE_string(
  "evaluation", "test", "Which file of the runs: test, validation, or such as test-freeze0.1."
)
_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 62rem; margin: 2rem auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } img { max-width: 100% } dt { font-weight: bold }
"""


def groups_of(folders: Sequence[pathlib.Path], name: str) -> dict[str, list[tuple[Any, Any]]]:
  """What is compared, by protocol: the (settings, curve) of all runs of it.

  Raises:
    ValueError: no run was evaluated, or runs of one protocol were trained unlike.
  """
  groups: dict[str, list[tuple[Any, Any]]] = {}
  for folder in folders:
    file = folder / f"{name}.json"
    if not file.exists():
      logging.warning("%s has no %s.json: left out. Run experiments.evaluate.", folder, name)
      continue
    settings, (curve,) = results.read_json(file)
    groups.setdefault(json.dumps(settings["protocol"], sort_keys=True), []).append(
      (settings, curve)
    )
  if not groups:
    raise ValueError(f"No run has {name}.json. Run experiments.evaluate on them first.")
  for members in groups.values():
    shared = [{k: v for k, v in s.items() if k != "arms"} for s, _ in members]
    for settings, (_, curve) in zip(shared, members, strict=True):
      if unlike := [k for k in settings if settings[k] != shared[0].get(k)]:
        raise ValueError(
          f"{curve.algorithm}, seed {curve.seed}, has another {', '.join(unlike)} than the first "
          "run of its protocol: such runs are not compared. Report them one by one."
        )
  return groups


def as_html(text: str) -> str:
  """Paragraphs and Markdown tables, as `results` makes them."""
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


def _picture(file: pathlib.Path, title: str) -> str:
  data = base64.b64encode(file.read_bytes()).decode()
  return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def section(out: pathlib.Path, number: int, members: Sequence[tuple[Any, Any]]) -> str:
  """Tables and pictures of one protocol."""
  settings, curves = members[0][0], [curve for _, curve in members]
  parts = [f"<h2>{html.escape(settings['protocol']['data'])}</h2>", "<dl>"]
  for key, value in settings["protocol"].items():
    parts.append(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>")
  seeds = sorted({curve.seed for curve in curves})
  training = f"{settings['meta_steps']} meta-steps of {settings['meta_batch']} tasks, seeds {seeds}"
  parts.append(f"<dt>training</dt><dd>{html.escape(training)}</dd></dl>")

  tables = [results.accuracy_table(curves)]
  if results.has(curves, "accuracy"):
    tables.append(results.overfitting_table(curves))
  names = list(results.group_by_algorithm(curves))
  at = list(settings["adapt_steps"]).index(settings["report_step"])
  for reference in [name for name in names if plots.learns_sigma(name)]:
    if len(names) > 1:
      tables.append(results.paired_table(curves, reference, at))
  tables.append(results.cost_table(curves, settings["meta_batch"]))
  parts += map(as_html, tables)
  file = out / f"adaptation_{number}.png"
  plots.adaptation_curves(file, curves)
  parts.append(_picture(file, "against adaptation steps"))

  learned = [curve for curve in curves if plots.learns_sigma(curve.algorithm)]
  if learned:
    for draw in (plots.sigma_per_module, plots.sigma_heat_map):
      file = out / f"{draw.__name__}_{number}.png"
      draw(file, learned)
      parts.append(_picture(file, draw.__name__.replace("_", " ")))
    agreement = results.sigma_agreement(learned)
    rows = "".join(f"\n| {name} | {value:.2f} |" for name, value in agreement.items())
    if rows:
      title = "Rank correlation of sigma over modules, mean over pairs of seeds"
      parts.append(as_html(f"{title}\n\n| algorithm | correlation |\n|---|---|{rows}"))
  return "\n".join(parts)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.report runs/small_data")
  try:
    groups = groups_of(runs.find(argv[1:]), _NAME.value)
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  sections = [section(out, i, members) for i, members in enumerate(groups.values())]
  about = html.escape(json.dumps(results.environment()))
  page = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>shrinkmeta: report</title>'
    f"<style>{_STYLE}</style><h1>Report</h1>\n"
    + "\n".join(sections)
    + f"\n<p>Reported on {about}.</p></html>\n"
  )
  with results.atomic(out / "index.html") as temporary:
    temporary.write_text(page, encoding="utf-8")
  logging.info("The report is %s", out / "index.html")


if __name__ == "__main__":
  app.run(main)
