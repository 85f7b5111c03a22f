"""A run that is killed and restarted ends with the bits of an uninterrupted run."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.devices.scale_test import ENVIRONMENT, free_port, start

pytestmark = pytest.mark.slow

# Forks a training run from a process that has imported everything, which saves most of a start.
SERVER = """
import os, sys
import jax, orbax.checkpoint
import fit_worker
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
print("ready", flush=True)
for line in sys.stdin:
  child = os.fork()
  if child == 0:
    sys.stdin.close()
    sys.argv = ["fit_worker", *line.split()]
    try:
      fit_worker.main()
    except BaseException as error:
      print(repr(error), file=sys.stderr, flush=True)
      os._exit(1)
    os._exit(0)
  print(child, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
  """Starts runs one after another."""

  def __init__(self, cache: pathlib.Path):
    self.process = subprocess.Popen(
      [sys.executable, "-c", SERVER, str(cache)],
      env=ENVIRONMENT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self.read() == "ready"

  def read(self) -> str:
    assert self.process.stdout is not None
    return self.process.stdout.readline().strip()

  def start(self, *arguments: object) -> int:
    assert self.process.stdin is not None
    self.process.stdin.write(" ".join(map(str, arguments)) + "\n")
    self.process.stdin.flush()
    return int(self.read())

  def exit_code(self) -> int:
    return int(self.read())


@pytest.fixture
def server(tmp_path):
  server = Server(tmp_path / "cache")
  yield server
  server.process.kill()
  server.process.wait()


def is_writing(folder: pathlib.Path) -> bool:
  return folder.is_dir() and any("checkpoint-tmp" in name for name in os.listdir(folder))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
  deadline = time.perf_counter() + seconds
  while not condition():
    assert time.perf_counter() < deadline, "nothing happened"
    time.sleep(0.0005)


def last_step(folder: pathlib.Path) -> int:
  names = os.listdir(folder) if folder.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def test_thirty_kills_in_a_run_of_200_steps(tmp_path, server):
  common = ["--steps", 200, "--every", 3, "--width", 4, "--meta_batch", 2]
  server.start(*common, "--folder", tmp_path / "a", "--out", tmp_path / "a.npz")
  assert server.exit_code() == 0
  rng, folder = random.Random(0), tmp_path / "b"
  again = [*common, "--folder", folder, "--out", tmp_path / "b.npz"]
  writes = 0
  for kill in range(30):
    child = server.start(*again)
    goal = last_step(folder) + 3 * rng.randrange(4)
    if goal > 180:  # near the end: kill it before its first step
      time.sleep(rng.uniform(0.0, 0.3))
    else:
      wait_for(lambda goal=goal: last_step(folder) >= goal)
      if kill % 3 == 0:
        wait_for(lambda: is_writing(folder))
      else:
        time.sleep(rng.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert server.exit_code() == -signal.SIGKILL
    writes += is_writing(folder)
  assert writes >= 5 and 0 < last_step(folder) < 200
  server.start(*again)
  assert server.exit_code() == 0
  one, other = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
  states = [name for name in one.files if not name.startswith("metrics")]
  assert len(states) > 20
  for name in states:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def pair(*arguments: object) -> list[subprocess.Popen[str]]:
  """Start two processes of one run."""
  shared = [*arguments, "--processes", 2, "--coordinator", f"localhost:{free_port()}"]
  return [start(*shared, "--process", i) for i in range(2)]


def test_one_of_two_processes_is_killed(tmp_path):
  def run(name):
    sizes = ["--steps", 30, "--every", 4, "--width", 4, "--meta_batch", 4]
    return pair(*sizes, "--folder", tmp_path / name, "--out", tmp_path / f"{name}.npz")

  for process in run("a"):
    assert process.wait(timeout=300) == 0
  first = run("b")
  wait_for(lambda: last_step(tmp_path / "b") >= 8)
  first[1].kill()
  time.sleep(0.5)  # then end the other one, as a scheduler would
  first[0].kill()
  assert [process.wait() for process in first][1] == -signal.SIGKILL
  assert 8 <= last_step(tmp_path / "b") < 30
  for process in run("b"):
    assert process.wait(timeout=300) == 0
  one, other = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
  for name in one.files:
    if not name.startswith("metrics"):
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
  both = pair("--steps", 100_000, "--every", 100_000, "--width", 4, "--folder", tmp_path / "run")
  log = tmp_path / "run" / "log.jsonl"
  wait_for(lambda: log.is_file() and log.stat().st_size > 2_000)
  both[1].terminate()
  for process in both:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
  steps = [int(name) for name in os.listdir(tmp_path / "run") if name.isdigit()]
  records = log.read_text().splitlines()
  assert steps == [len(records)]


def test_resumed_with_another_number_of_devices(tmp_path):
  common = ["--every", 10, "--meta_batch", 6]
  runs = [(20, 1, "a", "a.npz"), (10, 1, "b", "-"), (20, 3, "b", "b.npz")]
  for steps, devices, folder, out in runs:
    process = start(
      *common,
      *("--steps", steps, "--devices", devices),
      *("--folder", tmp_path / folder, "--out", tmp_path / out),
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
  one, other = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
  for name in one.files:
    if name.startswith(("phi", "log_sigma2")):
      error = np.linalg.norm(one[name] - other[name]) / np.linalg.norm(one[name])
      assert error <= 1e-6, (name, error)
