"""Why does the method fall behind where it does? Two experiments, each with a table as CSV.

    python -m experiments.causes
    python -m experiments.causes runs/few_shot/fomaml-10 runs/few_shot/sigma_imaml-10

Without arguments: linear-Gaussian tasks, where the best sigma is known in closed form. Which sigma
is learned by loops that end before the mode, with implicit and with unrolled gradients?

With folders of runs: the phi of every run is adapted as every run adapts. `--factors=0.5,1,2` also
multiplies sigma.

Results go into runs/causes by default. What came out is in results/notebook.md.
"""

import csv
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.causes import crossed, linear
from experiments.runs import files
from experiments.settings import flags as shared
from experiments.settings import machine, paths

_OUT = shared.out()
_SPLIT = shared.split()
_DATA_DIR = shared.data_dir()
_STEPS = flags.DEFINE_list("steps", list(map(str, linear.STEPS)), "Inner steps of the loops.")
_FACTORS = flags.DEFINE_list("factors", ["1"], "Numbers to multiply sigma of crossed runs with.")


def numbers(flag: str, texts: Sequence[str], kind: type[Any]) -> tuple[Any, ...]:
  """Return the numbers above 0 in a list flag."""
  try:
    found = tuple(kind(text) for text in texts)
  except ValueError:
    found = ()
  if not found or not all(0 < x < math.inf for x in found):
    raise ValueError(
      f"--{flag} wants numbers above 0, separated by commas; got {','.join(texts)!r}."
    )
  return found


def main(argv: Sequence[str]) -> None:
  """Read the flags, run one of the two experiments, and write its table."""
  machine.start_jax()
  with shared.usage():
    folders = [paths.local("A folder of a run", text) for text in argv[1:]]
    steps, factors = numbers("steps", _STEPS.value, int), numbers("factors", _FACTORS.value, float)
    out = pathlib.Path(shared.or_default(_OUT, "runs/causes"))
    if folders:
      rows = [r._asdict() for r in crossed.cross(folders, factors, _SPLIT.value, _DATA_DIR.value)]
    else:
      rows = [linear.record(one) for one in linear.run(steps)]
  name = "crossed" if folders else "linear"
  settings = {"steps": steps, "factors": factors, "runs": [str(f) for f in folders], "seed": 0}
  files.write_document(out / f"{name}.json", {"config": settings, "rows": rows})
  table = out / f"{name}.csv"
  with files.atomic(table) as temporary, temporary.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
