"""Other libraries, measured by scripts in a folder outside this project.

The folder holds `bench_torch.py` and `bench_jax.py`, each of which takes --lib, --workload, --alg,
--steps, --tasks, --reps, --max-seconds and prints one JSON line. This project imports nothing from
that folder.
"""

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmarks.worker import Config

_ALL = ("maml", "fomaml", "imaml", "reptile")
_EXPLICIT = ("maml", "fomaml", "reptile")
_FAST_CONV = ("--conv", "eigen", "--pool", "max4", "--inner", "scan", "--batching", "shard")
_MLP = ("--inner", "scan", "--batching", "vmap")


class Rival(NamedTuple):
  """How the script of another library is called."""

  script: str
  lib: str
  algorithms: tuple[str, ...]


RIVALS = {
  "learn2learn": Rival("bench_torch.py", "learn2learn", _EXPLICIT),
  "higher": Rival("bench_torch.py", "higher", _EXPLICIT),
  "torchopt": Rival("bench_torch.py", "torchopt", _ALL),
  "torch-loop": Rival("bench_torch.py", "loop", _ALL),
  "torch-func": Rival("bench_torch.py", "func", _ALL),
  "jax": Rival("bench_jax.py", "jax", _ALL),
  "jaxopt": Rival("bench_jax.py", "jaxopt", ("imaml",)),
}

# Algorithm that only this library has -> algorithm of rivals that it is compared with.
NEAREST = {"sigma_imaml": "imaml", "adapt": "reptile"}


def command(name: str, config: Config, peers: str, python: str) -> list[str]:
  """Return the command line that measures the rival on the configuration's workload.

  Raises:
    ValueError: the rival, folder or interpreter does not exist, or the rival lacks this workload or
      algorithm.
  """
  if name not in RIVALS:
    raise ValueError(f"{name!r} is no rival; choose one of {', '.join(RIVALS)}.")
  rival, algorithm = RIVALS[name], NEAREST.get(config.algorithm, config.algorithm)
  if algorithm not in rival.algorithms:
    raise ValueError(
      f"{name} has no {algorithm}, only {', '.join(rival.algorithms)}; choose another --rival."
    )
  if config.workload == "w4":
    raise ValueError("No rival runs w4; compare settings of this library with --against.")
  if config.tiny or config.shots is not None:
    raise ValueError("The rivals' scripts know neither --tiny nor --shots.")
  script = pathlib.Path(peers) / rival.script
  if not script.is_file():
    raise ValueError(
      f"--peers must be the folder of the rivals' scripts; {rival.script} is not in {peers!r}."
    )
  if shutil.which(python) is None:
    raise ValueError(f"--rival_python must be a Python with {name}; {python!r} cannot be run.")
  workload, source = config.load(), "w1" if config.workload == "w5" else config.workload
  steps = workload.mode_steps if algorithm == "imaml" else workload.steps
  line = [python, str(script), "--lib", rival.lib, "--workload", source, "--alg", algorithm]
  line += ["--steps", str(steps), "--tasks", str(workload.tasks)]
  line += ["--reps", str(config.repetitions), "--max-seconds", f"{config.max_seconds:g}"]
  if rival.script == "bench_jax.py":
    line += _MLP if source == "w3" else _FAST_CONV
  if rival.lib == "func" and source == "w3":
    line += ["--threads", "1"]  # its faster way: threads cost more than they save at this size
  if rival.lib == "func" and source == "w2":
    line += ["--chunk", "1"]  # a task at a time: all at once takes more memory than most machines
  return line


def parse(text: str) -> dict[str, Any]:
  """Return the record that a rival printed: the last line that is a JSON object.

  Raises:
    ValueError: no line is a JSON object, or the record reports an error.
  """
  for line in reversed(text.splitlines()):
    if line.startswith("{"):
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if "error" in record:
        raise ValueError(f"The rival {record.get('lib', '')} says: {record['error']}.")
      return record
  raise ValueError(f"The rival printed no JSON line; it printed:\n{text[-2000:]}")


def run(line: list[str]) -> dict[str, Any]:
  """Run the command, and return its measurement under the field names of this package."""
  environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # the folder is not ours to write in
  environment.pop("PYTHONPATH", None)  # nor are our packages its own
  done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  try:
    return to_record(parse(done.stdout))
  except ValueError as error:
    raise RuntimeError(f"{' '.join(line)}\n{error}\n{done.stderr[-2000:]}") from error


def to_record(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """Return a rival's fields under the names of this package; "raw" keeps the rival's own record."""
  seconds = theirs["seconds_per_step"]
  return {
    "library": theirs["lib"],
    "seconds": {"median": seconds, "low": theirs["best"], "high": None, "repeats": theirs["reps"]},
    "own_cores": theirs["own_cores"],
    "other_cores": theirs["other_cores"],
    "contended": theirs["contended"],
    "compile_seconds": theirs["compile_s"],
    "peak_rss_bytes": theirs["peak_rss_mb"] * 2**20,
    "useful_gflops": theirs.get("gflops"),
    "raw": dict(theirs),
  }
