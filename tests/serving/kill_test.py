"""A killed writer loses nothing and leaves no partial save; one process writes at a time."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from shrinkmeta.serving import files as delta_files
from shrinkmeta.serving import index as delta_index
from shrinkmeta.serving.files import load_deltas, save_deltas
from tests.serving.deltas_test import (
  STATE,
  equal,
  owned,
  shards,
)

pytest.importorskip("safetensors")
TESTS = pathlib.Path(__file__).absolute().parents[1]


def all_ids(folder):
  try:
    return delta_index.read_index(folder).ids()
  except FileNotFoundError:
    return ()


@pytest.mark.parametrize("step", range(9))
def test_a_save_that_ends_between_two_steps_loses_nothing(tmp_path, monkeypatch, step):
  """The disk as it is after each fsync and rename of a save of two shards."""
  save_deltas(tmp_path, owned(["a", "b"]))
  calls = []

  def dies(name, action):
    def call(*arguments):
      if len(calls) == step:
        raise KeyboardInterrupt
      calls.append(name)
      return action(*arguments)

    return call

  with monkeypatch.context() as patched:
    patched.setattr(os, "fsync", dies("fsync", os.fsync))
    patched.setattr(os, "replace", dies("replace", os.replace))
    with pytest.raises(KeyboardInterrupt):
      save_deltas(tmp_path, owned(["b", "c"], [5, 6]), overwrite=True, shard_bytes=40)
  new = step == 8  # the call after the one that renames the index
  assert equal(load_deltas(tmp_path, STATE), owned(["a", "b"])) != new
  save_deltas(tmp_path, owned(["b", "c"], [5, 6]), overwrite=True)
  assert equal(load_deltas(tmp_path, STATE), owned(["a", "b", "c"], [0, 5, 6]))
  assert len(shards(tmp_path)) == 2 and not list(tmp_path.glob("deltas-*.tmp"))


# Forks a writer for each line of its input. The writer saves NumPy's arrays and starts no work of
# JAX, whose threads do not survive a fork.
SERVER = """
  import os, sys
  import numpy as np
  import jax
  from shrinkmeta.serving.files import save_deltas
  from shrinkmeta.serving.deltas import About, Deltas
  from tests.serving.deltas_test import owned

  patterns = [owned([0, 1], [n, n + 1]) for n in range(10)]
  patterns = [Deltas(jax.tree.map(np.asarray, own.thetas), own.about) for own in patterns]
  print("ready", flush=True)
  for line in sys.stdin:
    child = os.fork()
    if child == 0:
      for n in range(int(line), int(line) + 100):
        own = patterns[n % 10]
        about = About((f"{n}/0", f"{n}/1"), own.labels, own.fingerprint)
        save_deltas(sys.argv[1], Deltas(own.thetas, about))
        os.write(1, f"saved {n}\\n".encode())
      os._exit(0)
    os.write(1, f"writer {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_appending(tmp_path, kills):
  """What a process reported as saved is there; of the save it was killed in, all or nothing."""
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
  command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SERVER), str(tmp_path)]
  chance, saved, unreported = random.Random(0), set(), 0
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes) as server:
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    for _ in range(kills):
      server.stdin.write(f"{max(saved, default=-1) + 1}\n")
      said = []
      while not said or said[-1][0] != "writer":
        said.append(server.stdout.readline().split())
      time.sleep(chance.uniform(0.0, 0.2))
      os.kill(int(said[-1][1]), signal.SIGKILL)
      while said[-1][0] != "dead":
        said.append(server.stdout.readline().split())
      saved |= {int(words[1]) for words in said if words[0] == "saved"}
      found = {int(str(task).split("/")[0]) for task in all_ids(tmp_path)}
      assert saved <= found and len(found - saved) <= 1
      unreported += len(found - saved)
      saved = found
      if saved:
        ids = [f"{n}/{i}" for n in sorted(saved) for i in (0, 1)]
        seeds = [n % 10 + i for n in sorted(saved) for i in (0, 1)]
        assert equal(load_deltas(tmp_path, STATE), owned(ids, seeds))
    server.stdin.close()
  assert server.returncode == 0
  save_deltas(tmp_path, owned(["last"]))
  assert all_ids(tmp_path)[-1] == "last" and len(all_ids(tmp_path)) == 2 * len(saved) + 1
  print(f"{kills} kills, {len(saved)} saves, {unreported} of them killed before they were reported")


def test_a_reader_whose_shard_is_deleted_meanwhile_reads_the_new_one(tmp_path, monkeypatch):
  save_deltas(tmp_path, owned(["a", "b"]))
  read_shard, calls = delta_files._read_shard, []

  def overwritten_first(*arguments):
    calls.append(arguments[0].name)
    if len(calls) == 1:
      save_deltas(tmp_path, owned(["a", "b"], [7, 8]), overwrite=True)
    return read_shard(*arguments)

  monkeypatch.setattr(delta_files, "_read_shard", overwritten_first)
  assert equal(load_deltas(tmp_path, STATE), owned(["a", "b"], [7, 8]))
  assert calls == ["deltas-0000000000.safetensors", "deltas-0000000001.safetensors"]


def test_one_writer_at_a_time(tmp_path):
  save_deltas(tmp_path, owned(["a"]))
  with delta_index.writing(tmp_path, 0.0):
    with pytest.raises(TimeoutError, match=f"id {os.getpid()}.*Nothing was written"):
      save_deltas(tmp_path, owned(["b"]), wait=0.05)
    assert load_deltas(tmp_path, STATE).ids == ("a",)  # readers do not wait
  save_deltas(tmp_path, owned(["b"]), wait=0.0)
  assert load_deltas(tmp_path, STATE).ids == ("a", "b")
