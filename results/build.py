"""Write the result pages from their texts and the CSV files.

`NAME.text.md` becomes `NAME.md` in the same folder. A line such as

    <!-- table: accuracy.csv across step -->

is replaced by the table in that file. What follows the file's name says how to lay it out:

    without a, b     leave the columns a and b out
    across step      one column of the page for each value of `step`
    listing a, b     one line for each value of the other columns, with its pairs "a b" in a row

Run `python results/build.py` after a change. `python results/build.py --check` writes nothing
and fails if a page is not what the texts and CSV files give.
"""

import argparse
import csv
import pathlib
import re
import sys

RESULTS = pathlib.Path(__file__).resolve().parent
DIRECTIVE = re.compile(
  r"<!-- table: (?P<path>\S+\.csv)"
  r"(?: without (?P<without>[\w, ]+?))?"
  r"(?: across (?P<across>\w+)| listing (?P<key>\w+), (?P<value>\w+))? -->"
)
COMPANIONS = ("_ci95", "_rival", "_step")  # of a column: half-width of its interval, and notes
HEADINGS = {  # of columns that begin so; what follows in their names is written behind
  "accuracy_percent": "accuracy, %",
  "accuracy_difference_points": "difference in accuracy, points",
  "nll_nats_per_example": "nats per example",
  "nll_difference_nats_per_example": "difference in nats per example",
  "rank_correlation": "rank correlation of σ",
  "log_sigma_correlation": "correlation of log σ",
  "sigma_seed": "σ, seed",
  "gradient_norm_at_mode": "gradient norm at θ̂",
  "task_specific_parameters_percent": "task-specific parameters, %",
  "task_specific_modules": "task-specific modules",
}


def read(path):
  """Return the header of a CSV file and its records, each a dictionary of strings."""
  with path.open(newline="", encoding="utf-8") as file:
    reader = csv.DictReader(file, strict=True)
    records = list(reader)
  header = reader.fieldnames or []
  for number, record in enumerate(records, 2):
    if None in record or None in record.values():
      raise ValueError(f"{path}, record {number}: want {len(header)} fields, got {record}.")
  return header, records


def is_number(text):
  """Tell whether a field is a number; `nan` is one and stands for a run that diverged."""
  try:
    float(text)
  except ValueError:
    return False
  return True


def heading(column):
  """Turn the name of a column into words."""
  for name, written in HEADINGS.items():
    if column.startswith(name):
      rest = column.removeprefix(name).strip("_").replace("_", " ")
      return f"{written}, {rest}" if rest else written
  if column.endswith("_seconds"):
    return column.removesuffix("_seconds").replace("_", " ") + ", s"
  return "σ" if column == "sigma" else column.replace("_", " ")


def cell(record, column):
  """Write one value: its sign if it is a difference, its interval, its rival and step."""
  text, interval = record[column], record.get(column + "_ci95")
  if interval and "e" in text and "e" not in interval:  # with the decimals of its interval
    text = f"{float(text):.{len(interval.partition('.')[2])}f}"
  if text == "nan":
    text = "diverged"
  elif "_difference_" in column and is_number(text) and not text.startswith("-"):
    text = "+" + text
  if interval:
    text += f" ± {interval}"
  notes = [record.get(column + name) for name in ("_rival", "_step")]
  notes = " @ ".join(note for note in notes if note)
  return f"{text} ({notes})" if notes else text


def shown_columns(header, without):
  """Drop the columns that another column's cell already shows, and those left out."""
  missing = set(without) - set(header)
  if missing:
    raise ValueError(f"No column {sorted(missing)} to leave out; there are {header}.")
  companions = {name + companion for name in header for companion in COMPANIONS}
  return [name for name in header if name not in companions and name not in without]


def across(records, columns, key):
  """Spread the last column over the values of `key`: (head, rows)."""
  *fixed, value = [name for name in columns if name != key]
  steps = list(dict.fromkeys(record[key] for record in records))
  if all(step.isdigit() for step in steps):
    steps.sort(key=int)
  rows = {}
  for record in records:
    rows.setdefault(tuple(record[name] for name in fixed), {})[record[key]] = cell(record, value)
  head = [heading(name) for name in fixed] + steps
  return head, [[*row, *(cells.get(step, "") for step in steps)] for row, cells in rows.items()]


def listing(records, columns, key, value):
  """Put the pairs (key, value) of each group into one cell: (head, rows)."""
  fixed = [name for name in columns if name not in (key, value)]
  rows = {}
  for record in records:
    pairs = rows.setdefault(tuple(record[name] for name in fixed), [])
    pairs.append(f"{record[key]} {cell(record, value)}")
  head = [*(heading(name) for name in fixed), f"{heading(value)} of each {heading(key)}"]
  return head, [[*row, ", ".join(pairs)] for row, pairs in rows.items()]


def markdown(head, rows):
  """Write a Markdown table; columns whose cells begin with a number are aligned right."""
  begins_with_number = re.compile(r"[+-]?\d|diverged|$")
  columns = list(zip(*rows, strict=True))
  right = [all(map(begins_with_number.match, column)) for column in columns]
  widths = [max(map(len, (title, *column))) for title, column in zip(head, columns, strict=True)]
  line = lambda cells: "| " + " | ".join(cells) + " |"
  pad = lambda cells: line(
    text.rjust(width) if r else text.ljust(width)
    for text, width, r in zip(cells, widths, right, strict=True)
  )
  rule = line(
    "-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)
  )
  return "\n".join([pad(head), rule, *map(pad, rows)])


def table(folder, directive):
  """Return the Markdown table that a directive of a text asks for."""
  header, records = read(folder / directive["path"])
  columns = shown_columns(header, re.findall(r"\w+", directive["without"] or ""))
  if directive["across"]:
    head, rows = across(records, columns, directive["across"])
  elif directive["key"]:
    head, rows = listing(records, columns, directive["key"], directive["value"])
  else:
    head = [heading(name) for name in columns]
    rows = [[cell(record, name) for name in columns] for record in records]
  return f"{markdown(head, rows)}\n\n[{directive['path']}]({directive['path']})"


def page(text_file):
  """Return the page of a text file, its tables in place."""
  text = text_file.read_text(encoding="utf-8")
  text = DIRECTIVE.sub(lambda directive: table(text_file.parent, directive), text)
  if "<!-- table:" in text:
    raise ValueError(f"{text_file}: a table directive that cannot be read; see {__file__}.")
  return f"<!-- Written by results/build.py from {text_file.name}; edit that file. -->\n\n{text}"


def pages(results=RESULTS):
  """Return {page's path: its contents} for every text file under `results`."""
  return {
    text_file.with_name(text_file.name.replace(".text.md", ".md")): page(text_file)
    for text_file in sorted(results.rglob("*.text.md"))
  }


def main():
  """Write the pages, or check them."""
  parser = argparse.ArgumentParser(description="Write the result pages from their CSV files.")
  parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
  check = parser.parse_args().check
  for path, contents in pages().items():
    if path.exists() and path.read_text(encoding="utf-8") == contents:
      continue
    if check:
      sys.exit(f"{path} is not what its text and CSV files give: run python results/build.py.")
    path.write_text(contents, encoding="utf-8")
    print(path.relative_to(RESULTS))


if __name__ == "__main__":
  main()
