"""Two processes that differ find out at the start."""

import json
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from experiments.processes import together

ROOT = pathlib.Path(__file__).parents[3]
WORKER = """
import json, pathlib, sys
from experiments.settings import machine
port, own, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
machine.start_jax(1, processes=machine.Processes(f"localhost:{port}", 2, own))
from experiments.processes import together
together._SECONDS = 0.5

def told(check, *arguments):
  try:
    check(*arguments)
  except ValueError as error:
    return str(error)
  return None

at = lambda i: folder / ("both" if i is None else f"machine{i}") / "run"
blocked = folder / "blocked"
results = {
  "alike": told(together.check_alike, {"a": {"rate": 0.1}, "steps": 3}),
  "another rate": told(together.check_alike, {"a": {"rate": [0.1, 0.8][own]}, "steps": 3}),
  "absent": told(together.check_alike, {"a": {"rate": 0.1}, **[{}, {"steps": 3}][own]}),
  "many": told(together.check_alike, {f"s{i}": own for i in range(9)}),
  "shared": told(together.check_shared, "--out", at(None)),
  "not shared": told(together.check_shared, "--out", at(own)),
  "not writable": told(together.check_shared, "--out", blocked / "run"),
}
results["left"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
print(json.dumps(results), flush=True)
"""


def test_two_processes(tmp_path):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  (tmp_path / "blocked").write_text("a file, no folder")
  command = lambda own: [sys.executable, "-c", WORKER, str(port), str(own), str(tmp_path)]
  start = lambda own: subprocess.Popen(
    command(own), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  running = [start(0), start(1)]
  done = [one.communicate(timeout=180) for one in running]
  for process, (stdout, stderr) in enumerate(done):
    assert running[process].returncode == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    assert found["alike"] is None and found["shared"] is None
    assert (
      "settings: a.rate: 0.1 in process 0, 0.8 in process 1. Start all" in found["another rate"]
    )
    assert "steps: 'absent' in process 0, 3 in process 1" in found["absent"]
    assert found["many"].count("in process 1") == 5 and "and 4 more" in found["many"]
    assert found["not shared"].startswith("--out is a folder that all processes share; ")
    assert f"machine{process}/run is not there for process 1" in found["not shared"]
    assert found["not writable"].startswith("--out: process 0 cannot write to ")
    assert found["left"] == ["blocked", "both", "both/run", "machine0", "machine0/run"]


def test_one_process_is_like_itself(tmp_path):
  together.check_alike({"a": 1})
  together.check_shared("--out", tmp_path / "x")
  assert not (tmp_path / "x").exists()


def test_a_fingerprint_tells_data_apart():
  tree = {"a": np.arange(6, dtype=np.uint8), "b": jnp.ones([])}
  other = {**tree, "a": tree["a"].reshape(2, 3)}
  assert together.fingerprint(tree) == together.fingerprint({**tree, "a": tree["a"].copy()})
  changed = {**tree, "b": jnp.zeros([])}
  assert len({together.fingerprint(x) for x in (tree, other, changed)}) == 3
