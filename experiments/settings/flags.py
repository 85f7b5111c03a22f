"""The vocabulary of flags: a flag means the same in every command that has it.

A command calls the functions of the flags that it has. A default of None stands for the command's
own choice, which the text at the head of its --help gives.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from absl import app, flags

from experiments.settings import algorithms as names
from experiments.settings import machine, paths, tables

T = TypeVar("T")
Text = flags.FlagHolder[str | None]
Texts = flags.FlagHolder[list[str] | None]


def algorithm() -> Text:
  """--algorithm, of commands that run one."""
  return flags.DEFINE_string("algorithm", None, "The algorithm; default as said above.")


def algorithms() -> Texts:
  """--algorithms."""
  return flags.DEFINE_list(
    "algorithms", None, f"Of {', '.join(names.ALL)}; or all. Default as said above."
  )


def compilation_cache() -> Text:
  """--compilation_cache."""
  return paths.define(
    "compilation_cache",
    "Folder that keeps compiled programs for the next run; default in ~/.cache/shrinkmeta. Empty: "
    "off.",
  )


def data_dir() -> Text:
  """--data_dir."""
  return paths.define("data_dir", "Folder of the data set; default $SHRINKMETA_DATA/NAME.")


def out() -> Text:
  """--out."""
  return paths.define("out", "Where results are written; default as said above.")


def open_page() -> flags.FlagHolder[bool]:
  """--open."""
  return flags.DEFINE_bool("open", False, "Opens the page in a browser once it is written.")


def seed() -> flags.FlagHolder[int]:
  """--seed, of commands that run one."""
  return flags.DEFINE_integer("seed", 0, "Seed of everything that is drawn at random.")


def seeds() -> Texts:
  """--seeds."""
  return flags.DEFINE_list(
    "seeds", None, "Seeds of parameters and training tasks, a run each. Default as said above."
  )


def changes() -> flags.FlagHolder[list[str]]:
  """--set."""
  return flags.DEFINE_multi_string(
    "set", [], "Changes one setting, as in --set=meta_steps=100; may be given several times."
  )


def split() -> flags.FlagHolder[str]:
  """--split."""
  return flags.DEFINE_enum(
    "split", "test", ["test", "validation"], "Tasks to adapt to; choose settings on validation."
  )


def table() -> flags.FlagHolder[str]:
  """--table."""
  return flags.DEFINE_enum("table", "sinusoid", list(tables.TABLES), "Data and settings.")


def table_size() -> flags.FlagHolder[str]:
  """--size."""
  return flags.DEFINE_enum("size", "cpu", list(tables.SIZES), "The machine the table is for.")


def tasks() -> flags.FlagHolder[int | None]:
  """--tasks."""
  return flags.DEFINE_integer("tasks", None, "Tasks per update; default as said above.", 1)


def define_processes() -> None:
  """The four flags of `processes`."""
  flags.DEFINE_string("coordinator_address", None, "host:port of process 0 of several.")
  flags.DEFINE_integer("num_processes", None, "How many processes run this program together.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  flags.DEFINE_bool(
    "distributed", False, "Several processes, started by SLURM, MPI or on a Cloud TPU pod."
  )


def processes() -> machine.Processes:
  """Read the flags of `define_processes`; raise UsageError if one of three is missing."""
  values = flags.FLAGS
  by_hand = (values.coordinator_address, values.num_processes, values.process_id)
  if any(x is not None for x in by_hand) and (None in by_hand or values.distributed):
    raise app.UsageError(
      "--coordinator_address, --num_processes and --process_id go together, or --distributed "
      f"alone; got {by_hand} and --distributed={values.distributed}."
    )
  return machine.Processes(*by_hand, detect=values.distributed)


def no_arguments(argv: Sequence[str]) -> None:
  """Raise UsageError if anything but flags was given."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")


@contextlib.contextmanager
def usage() -> Iterator[None]:
  """Report an error of flags, settings or data as one line, without a traceback."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise app.UsageError(str(error)) from error


def parse_seeds(texts: Sequence[str]) -> list[int]:
  """Return the numbers of --seeds; raise ValueError if one is none or comes twice."""
  try:
    seeds = [int(text) for text in texts]
  except ValueError:
    seeds = []
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"--seeds wants whole numbers, each of them once, as in --seeds=0,1; got {','.join(texts)!r}."
    )
  return seeds


def or_default(flag: flags.FlagHolder[T | None], default: T) -> T:
  """Return what was given, or the command's own default if nothing was."""
  return default if flag.value is None else flag.value
