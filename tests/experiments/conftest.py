"""Fixtures that run each command in a process of its own, after one shared import of JAX."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# It forks for every call before JAX has a device, so that each sets JAX up by itself.
SERVER = """
import importlib, json, os, runpy, signal, sys
for name in ("shrinkmeta", "flax.linen", "scipy.stats", "matplotlib.pyplot",
             "experiments.runs.search", "experiments.settings.flags",
             "shrinkmeta.mixed", "formulaic"):
  importlib.import_module(name)
for line in sys.stdin:
  module, program, arguments, *files = json.loads(line)
  if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    continue
  signal.alarm(300)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for number, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv = [module or "-c", *arguments]
  if module:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  else:
    exec(program, {"__name__": "__main__"})
  sys.exit()
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory):
  """(*arguments, module="" or program="") -> what subprocess.run returns of that Python program.

  Programs of XLA that one has compiled are read from a cache by the others, those of the other
  workers of pytest-xdist too: their folders are in one.
  """
  folder = tmp_path_factory.mktemp("python")
  worker = os.environ.get("PYTEST_XDIST_WORKER")
  shared = tmp_path_factory.getbasetemp().parent if worker else folder
  environment = {
    "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  outputs = [folder / "stdout", folder / "stderr"]
  command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
  with subprocess.Popen(
    command, cwd=ROOT, env=os.environ | environment, stdin=pipe, stdout=pipe, text=True
  ) as server:
    assert server.stdin is not None and server.stdout is not None
    ask, answer = server.stdin, server.stdout

    def call(*arguments, module="", program=""):
      given = [module, program, [str(argument) for argument in arguments], *map(str, outputs)]
      ask.write(json.dumps(given) + "\n")
      ask.flush()
      code = int(answer.readline())
      return subprocess.CompletedProcess(given[2], code, *(file.read_text() for file in outputs))

    yield call


@pytest.fixture(scope="session")
def command(python):
  """(name, *arguments) -> what subprocess.run returns of `python -m experiments.NAME`."""
  return lambda name, *arguments: python(*arguments, module=f"experiments.{name}")
