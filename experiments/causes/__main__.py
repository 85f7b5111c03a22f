"""Why does a method fall behind where it does? Four experiments, each with a table as CSV.

    python -m experiments.causes --experiment=linear
    python -m experiments.causes --experiment=kinks
    python -m experiments.causes runs/few_shot/fomaml-10 runs/few_shot/sigma_imaml-10
    python -m experiments.causes runs/few_shot/fomaml-10 runs/few_shot/maml-10 --experiment=outliers

linear: the best sigma is known. Which sigma is learned if the loop ends before the mode, by an
implicit and by an unrolled gradient? By default there are 256 tasks.

kinks: does a ReLU network reach a mode where the implicit gradient holds? By default there are 8
tasks.

crossed, with folders of runs: the phi of every run is adapted as every run adapts.
`--factors=0.5,1,2` also multiplies sigma.

outliers, with folders of runs: how long are the gradients of single tasks, and how well do the mean
gradients of two halves of the tasks agree? By default there are 192 tasks.

Results go into runs/causes by default. What came out is in results/notebook.md.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.causes import crossed, kinks, linear, outliers
from experiments.runs import files
from experiments.settings import flags as shared
from experiments.settings import machine, paths

_OUT = shared.out()
_SPLIT = shared.split()
_DATA_DIR = shared.data_dir()
_WITH_FOLDERS, _WITHOUT = ("crossed", "outliers"), ("linear", "kinks")
_EXPERIMENT = flags.DEFINE_enum(
  "experiment", None, (*_WITHOUT, *_WITH_FOLDERS), "Default: linear; crossed, if folders are named."
)
_TASKS = shared.tasks()
_STEPS = flags.DEFINE_list("steps", [], "Inner steps of the loops; default: those of the table.")
_FACTORS = flags.DEFINE_list(
  "factors", [], "Numbers to multiply sigma with, in crossed runs alone."
)


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
  """Read the flags, run one of the experiments, and write its table."""
  machine.start_jax()
  with shared.usage():
    folders = [paths.local("A folder of a run", text) for text in argv[1:]]
    steps = numbers("steps", _STEPS.value, int) if _STEPS.value else None
    factors = numbers("factors", _FACTORS.value, float) if _FACTORS.value else None
    name = _EXPERIMENT.value or ("crossed" if folders else "linear")
    if bool(folders) != (name in _WITH_FOLDERS):
      raise ValueError(
        f"--experiment={name} takes {'no' if folders else 'the'} folders of runs; got "
        f"{len(folders)}."
      )
    if folders and steps:
      raise ValueError("Runs have the inner steps of their training: leave --steps out.")
    if not folders and flags.FLAGS["data_dir"].present:
      raise ValueError("--data_dir is for folders of runs: name them.")
    if name != "crossed" and (flags.FLAGS["split"].present or factors):
      raise ValueError("--split and --factors are for crossed runs: name their folders.")
    if name == "crossed" and _TASKS.value:
      raise ValueError("Crossed runs have the tasks of their table: leave --tasks out.")
    out = pathlib.Path(shared.or_default(_OUT, "runs/causes"))
    if name == "crossed":
      factors = factors or (1.0,)
      settings = {"runs": [str(f) for f in folders], "split": _SPLIT.value, "factors": factors}
      found = crossed.cross(folders, factors, _SPLIT.value, _DATA_DIR.value)
      rows = [row._asdict() for row in found]
    elif name == "outliers":
      settings = {"runs": [str(f) for f in folders], "tasks": _TASKS.value or outliers.TASKS}
      found = outliers.compare(folders, settings["tasks"], _DATA_DIR.value)
      rows = [row._asdict() for row in found]
    else:
      module = {"linear": linear, "kinks": kinks}[name]
      tasks = {"count": _TASKS.value} if _TASKS.value else {}
      settings = {"steps": steps or module.STEPS, "keys": [0, 1], **tasks}
      rows = [module.record(one) for one in module.run(settings["steps"], **tasks)]
  files.write_document(out / f"{name}.json", {"config": settings, "rows": rows})
  table = out / f"{name}.csv"
  files.write_table(table, rows)
  print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
