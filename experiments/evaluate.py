"""Adapt trained runs to tasks that they were not trained on, and write the results beside them.

    python -m experiments.evaluate runs/small_data
    python -m experiments.evaluate runs/small_data --freeze=0.1,0.2,0.4

A result that already exists is not computed again.
"""

import functools
import json
import math
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.runs import problems, results, store
from experiments.settings import flags as shared
from experiments.settings import machine, paths

_SPLIT = shared.split()
_FREEZE = flags.DEFINE_list(
  "freeze", [], "Thresholds of sigma. Modules below a threshold stay frozen in adaptation."
)
_DATA_DIR = shared.data_dir()
_CACHE = shared.compilation_cache()


def thresholds(texts: Sequence[str]) -> list[float]:
  """Return the numbers of --freeze."""
  try:
    found = [float(text) for text in texts]
  except ValueError:
    found = [math.nan]
  if not all(0 < value < math.inf for value in found):
    raise ValueError(
      f"--freeze wants finite numbers above 0, as in --freeze=0.1,0.2; got {','.join(texts)!r}."
    )
  return found


def main(argv: Sequence[str]) -> None:
  """Read the flags and evaluate every run at or below the folders given."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.evaluate runs/small_data")
  machine.start_jax(cache=_CACHE.value)
  split, data_dir = _SPLIT.value, _DATA_DIR.value
  with shared.usage():
    own = thresholds(_FREEZE.value)
    wanted = {f"{split}-freeze{results.number(value)}": value for value in own}
    folders = store.find([paths.local("A folder of runs", text) for text in argv[1:]])
  make = functools.cache(lambda settings: problems.make_problem(json.loads(settings), data_dir))
  failed: list[str] = []
  for folder in folders:
    try:
      store.evaluate(folder, split, wanted or {split: 0.0}, make)
    except Exception as error:  # whatever is wrong with one run, the others are evaluated
      expected = isinstance(error, (ValueError, OSError))  # these say what to do
      logging.error("%s: %s", folder, error, exc_info=not expected)
      failed.append(str(folder))
  if failed:
    logging.error("%d of %d runs are left: %s", len(failed), len(folders), ", ".join(failed))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
