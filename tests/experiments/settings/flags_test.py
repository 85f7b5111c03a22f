"""A flag has the same meaning in all commands."""

import json

import pytest
from absl import app

from experiments.settings import flags

COMMANDS = (
  *("glyphs", "train", "evaluate", "tune", "sinusoid"),
  *("report.__main__", "mixed.__main__", "benchmarks.__main__"),
)
# Every command is loaded with a registry of its own, since flags of a name collide in one.
LIST = """
import importlib, json, sys
from absl import flags
import experiments.settings.flags
found = {}
for command in sys.argv[1:]:
  before = set(flags.FLAGS)
  importlib.import_module(f"experiments.{command}")
  for name in set(flags.FLAGS) - before:
    flag = flags.FLAGS[name]
    kind = [type(flag.parser).__name__, getattr(flag.parser, "enum_values", None)]
    found.setdefault(name, {})[command] = [*kind, str(flag.default), flag.help]
    delattr(flags.FLAGS, name)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def flags_of_commands(python):
  done = python(*COMMANDS, program=LIST)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_flag_means_the_same_in_all_commands(flags_of_commands):
  found = flags_of_commands
  assert set(found["out"]) == set(COMMANDS) - {"evaluate", "mixed.__main__"}
  for name, by_command in found.items():
    if name == "trials":  # of a binomial response, and of a search: the word of both fields
      continue
    assert len({json.dumps(meaning) for meaning in by_command.values()}) == 1, (name, by_command)


def test_every_flag_of_a_path_is_read_as_one(flags_of_commands):
  kinds = {n: next(iter(c.values()))[0] for n, c in flags_of_commands.items()}
  found = {name for name, kind in kinds.items() if kind == "PathParser"}
  files = {"out", "data_dir", "compilation_cache", "checkpoints", "chosen"}
  assert found == files | {"data", "json", "plot", "predict", "peers", "rival_python"}


@pytest.mark.parametrize(
  "texts", (["x"], ["1", "1"], [], ["-1"], ["0", "4294967296"], [str(2**63)])
)
def test_seeds_are_distinct_numbers(texts):
  with pytest.raises(ValueError, match="--seeds wants whole numbers, each of them once"):
    flags.parse_seeds(texts)


def test_the_largest_seed():
  assert flags.parse_seeds(["0", "4294967295"]) == [0, 4294967295]


@pytest.mark.parametrize("seed", ("-1", "4294967296"))
def test_a_seed_that_jax_would_shorten_is_refused(command, seed):
  done = command("mixed", "--simulate=2", f"--seed={seed}")
  assert done.returncode == 1 and "flag --seed=" in done.stderr + done.stdout


def test_an_error_of_settings_is_one_of_usage():
  with pytest.raises(app.UsageError, match="too small"), flags.usage():
    raise ValueError("too small")


def test_arguments_that_are_no_flags_are_refused():
  flags.no_arguments(["command"])
  with pytest.raises(app.UsageError, match=r"Unexpected arguments: \['x'\]"):
    flags.no_arguments(["command", "x"])
