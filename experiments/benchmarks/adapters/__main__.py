"""How long do the adapters of many tasks take, beside PEFT?

    python -m experiments.benchmarks.adapters --peft_python=PYTHON --rounds=15

A Llama of 26 M parameters has adapters of rank 8 on q and v. The command times the base alone, one
batch with a row of each of 64 tasks, both also with one token a row, and the adaptation of all
tasks by SGD. PYTHON has torch, transformers and peft, and runs in a process of its own. The two
sides take turns, call by call, and each call runs once before it is timed. Without --peft_python
this library is timed alone. The command checks that both sides return the same numbers, prints a
table and appends JSON lines to --out.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

from absl import app, flags

from experiments.benchmarks import report
from experiments.benchmarks.adapters.compare import compare
from experiments.benchmarks.adapters.problem import Sizes
from experiments.settings import flags as shared
from experiments.settings import machine

_PYTHON = flags.DEFINE_string("peft_python", None, "A Python with torch, transformers and peft.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each call is timed.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 1, "Rows that each task adapts on.", lower_bound=1)
_OUT = shared.out()


def main(argv: Sequence[str]) -> None:
  """Read the flags, measure and print."""
  shared.no_arguments(argv)
  machine.start_jax()
  if _PYTHON.value is not None and shutil.which(_PYTHON.value) is None:
    raise app.UsageError(f"--peft_python must be a Python with peft; got {_PYTHON.value!r}.")
  out = pathlib.Path(shared.or_default(_OUT, "runs/adapters.jsonl"))
  report.append(out)  # before anything is measured
  sizes = Sizes(examples=_EXAMPLES.value)
  rows = compare(sizes, _ROUNDS.value, _PYTHON.value)
  for row in rows:
    report.append(out, {"sizes": dataclasses.asdict(sizes)} | report.environment() | row)
  print(report.table([{k: v for k, v in row.items() if k != "versions"} for row in rows]))


if __name__ == "__main__":
  app.run(main)
