"""Write the CSV files of a result page from the tables of `experiments.report`.

    python -m experiments.report runs/few_shot --out=report
    python results/from_report.py report/tables_1.md results/few_shot

A file that is there already is replaced. Cells such as "3.5 ± 0.4 (30)" become columns of their
own, and a run that diverged becomes nan.
"""

import argparse
import csv
import pathlib
import re

CELL = re.compile(
  r"(?P<mean>[+-]?[\d.]+(?:e[+-]?\d+)?)(?: ± (?P<half>\S+))?(?: \((?P<step>\d+)\))?"
)
ACCURACY, NLL = "accuracy_difference_points", "nll_difference_nats_per_example"
COLUMNS = {  # of a table -> of the CSV file
  "inner": "inner_optimizer",
  "outer": "outer_optimizer",
  "accuracy in points": ACCURACY,
  "nats per example": NLL,
  "accuracy in points, rival at its best": f"{ACCURACY}_rival_at_its_best",
  "nats per example, rival at its best": f"{NLL}_rival_at_its_best",
  "task-specific modules": "task_specific_modules",
  "% of parameters": "task_specific_parameters_percent",
  "tasks a second": "tasks_per_second",
  "times inner steps": "inner_steps_per_second",
  "compile, s": "compile_seconds",
  "train, s": "train_seconds",
  "adapt, s": "adapt_seconds",
  "failed tasks a step": "failed_tasks_per_meta_step",
  "gradient norm at theta_hat": "gradient_norm_at_mode",
  "relative residual of w": "relative_residual_of_w",
  "share of negative curvature": "negative_curvature_share",
  "rank correlation": "rank_correlation",
  "of log sigma": "log_sigma_correlation",
}


def sections(text):
  """Yield (words, header, rows) of each table; the words stand between it and the table before."""
  words, lines = "", []
  for line in [*text.splitlines(), ""]:
    if line.startswith("|"):
      lines.append([cell.strip() for cell in line[1:-1].split("|")])
    elif lines:
      yield words.strip(), lines[0], lines[2:]
      words, lines = line, []
    else:
      words += f"\n{line}"


def split(column, cell):
  """Return {column: text} of a cell, with its interval and its step if it has them."""
  found = CELL.fullmatch(cell)
  if cell == "diverged":
    return {column: "nan"}
  if found is None or found["half"] is None:
    return {column: "" if cell == "none" else cell}
  own = {column: found["mean"].lstrip("+"), f"{column}_ci95": found["half"]}
  return own | ({f"{column}_step": found["step"]} if found["step"] else {})


def records(header, rows):
  """Return the rows of a table as dictionaries of text."""
  names = [COLUMNS.get(name, name) for name in header]
  pairs = lambda row: (split(*pair) for pair in zip(names, row, strict=True))
  return [{k: v for pair in pairs(row) for k, v in pair.items()} for row in rows]


def by_step(header, rows, measure):
  """Return one record for each algorithm and adaptation step."""
  return [
    {"algorithm": row[0], "step": step, **split(measure, cell)}
    for row in rows
    for step, cell in zip(header[1:], row[1:], strict=True)
  ]


def files(text):
  """Return {name of a CSV file: its records} of the tables of one section of a report."""
  found = {}
  for words, header, rows in sections(text):
    title = words.rpartition("\n")[2]
    if title.startswith("Accuracy in %"):
      found["accuracy.csv"] = by_step(header, rows, "accuracy_percent")
    elif title.startswith("Negative log-likelihood"):
      found["nll.csv"] = by_step(header, rows, "nll_nats_per_example")
    elif paired := re.match(r"(\w+) minus rival after (\d+) adaptation steps", title):
      own = {"algorithm": paired[1], "rival": "", "step": paired[2]}
      found[f"differences_{paired[1]}.csv"] = [own | one for one in records(header, rows)]
    elif title.startswith("Sigma, geometric mean"):
      own = records(header[:-1], [row[:-1] for row in rows])
      found["sigma_agreement.csv"] = [one for one in own if one["rank_correlation"]]
      pairs = [(row[0], pair.split(" ")) for row in rows for pair in row[-1].split(", ")]
      found["sigma.csv"] = [{"algorithm": a, "module": m, "sigma": s} for a, (m, s) in pairs]
    elif frozen := re.match(r"(\w+), modules with sigma below .*, after (\d+) steps", title):
      part = "validation" if "Chosen on: validation" in words else "test"
      own = {"algorithm": frozen[1], "split": part, "step": frozen[2]}
      found.setdefault("freezing.csv", []).extend(own | one for one in records(header, rows))
    elif title.startswith("Cost: "):
      found["cost.csv"] = records(header, rows)
    elif title == "Settings":
      found["settings.csv"] = records(header, rows)
  return {name: rows for name, rows in found.items() if rows}


def main():
  """Read the arguments and write the files."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("tables", type=pathlib.Path, help="tables_N.md of a report")
  parser.add_argument("page", type=pathlib.Path, help="the folder of the page")
  given = parser.parse_args()
  found = files(given.tables.read_text(encoding="utf-8"))
  if not found:
    parser.error(f"{given.tables} has no table of a report: wanted tables_N.md.")
  given.page.mkdir(parents=True, exist_ok=True)
  for name, rows in found.items():
    header = list(dict.fromkeys(column for row in rows for column in row))
    with (given.page / name).open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
      writer.writeheader()
      writer.writerows(rows)
    print(f"{given.page / name}: {len(rows)} rows")


if __name__ == "__main__":
  main()
