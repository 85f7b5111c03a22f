"""Two processes with different settings raise an error at the start."""

import json
import pathlib
import socket
import subprocess
import sys

import shrinkmeta as sm

ROOT = pathlib.Path(__file__).parents[2]
WORKER = """
import json, pathlib, sys
from experiments.settings import machine
port, own, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
machine.start_jax(1, processes=machine.Processes(f"localhost:{port}", 2, own))
import jax, jax.numpy as jnp, optax, shrinkmeta as sm
from shrinkmeta.devices import processes as together
together._SECONDS = 0.5

def told(check, *arguments, **keywords):
  try:
    check(*arguments, **keywords)
  except (ValueError, RuntimeError) as error:
    return str(error)
  return None

def fit(inner_steps, start, steps=1, where=None, rate=0.1, outer_rate=0.1, **keywords):
  network = sm.gaussian(lambda theta, x: x * theta["w"])
  inner = sm.Inner(optax.sgd(rate), inner_steps)
  learner = sm.maml(network, {"w": "w"}, inner=inner, phi_optimizer=optax.sgd(outer_rate))
  batch = sm.Batch(jnp.ones((2, 4)), jnp.ones((2, 4)))
  tasks = lambda first, count: jax.tree.map(lambda x: x[:count], sm.Task(batch, batch))
  kept = None if where is None else sm.Checkpoints(where)
  options = {"meta_batch": 2, "checkpoints": kept} | keywords
  return told(sm.fit, learner, learner.init({"w": start}), tasks, steps, **options)

def classify(label, constants=None, **keywords):
  network = sm.categorical(lambda theta, x, *b: x[:, None] * theta["w"] + sum(b))
  learner = sm.maml(network, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1), mesh=sm.task_mesh())
  batch = lambda count: sm.Batch(jnp.ones((count, 4)), jnp.full((count, 4), label))
  tasks = lambda first, count: sm.Task(batch(count), batch(count))
  state = learner.init({"w": jnp.zeros(3)}, constants=constants)
  return told(sm.fit, learner, state, tasks, 2, meta_batch=2, **keywords)

at = lambda i: folder / ("both" if i is None else f"machine{i}") / "run"
blocked = folder / "blocked"
results = {
  "alike": told(together.check_alike, {"a": {"rate": 0.1}, "steps": 3}),
  "another rate": told(together.check_alike, {"a": {"rate": [0.1, 0.8][own]}, "steps": 3}),
  "absent": told(together.check_alike, {"a": {"rate": 0.1}, **[{}, {"steps": 3}][own]}),
  "lists": told(together.check_alike, {"a": {"s": [[1], [1, 2]][own]}, **[{}, {"n": None}][own]}),
  "many": told(together.check_alike, {f"s{i}": own for i in range(9)}),
  "shared": told(together.check_shared, "--out", at(None)),
  "not shared": told(together.check_shared, "--out", at(own)),
  "fit: inner steps": fit([1, 2][own], 0.0),
  "fit: parameters": fit(1, [0.0, 0.5][own]),
  "fit: meta_batch": fit(1, 0.0, meta_batch=[2, 4][own]),
  "fit: alike": fit(1, 0.0, micro_batches=2),
  "fit: rate": fit(1, 0.0, rate=[0.1, 0.8][own]),
  "fit: outer rate": fit(1, 0.0, outer_rate=[0.1, 0.8][own], micro_batches=2),
  "fit: label": classify([1, 7][own]),
  "fit: label in parts": classify([7, 1][own], jnp.ones(3), micro_batches=2),
  "fit: labels": classify(1, jnp.ones(3)),
  "fit: folder": fit(1, 0.0, where=at(own)),
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
    assert "a.s: [1] in process 0, [1, 2] in process 1" in found["lists"]
    assert "n: 'absent' in process 0, None in process 1" in found["lists"]
    assert found["many"].count("in process 1") == 5 and "and 4 more" in found["many"]
    assert found["not shared"].startswith("--out is a folder that all processes share; ")
    assert f"machine{process}/run is not there for process 1" in found["not shared"]
    assert "Inner.steps: 1 in process 0, 2 in process 1" in found["fit: inner steps"]
    assert "fingerprint.phi/w: " in found["fit: parameters"]
    assert "fit.meta_batch: 2 in process 0, 4 in process 1" in found["fit: meta_batch"]
    assert found["fit: alike"] is None
    for name in ("fit: rate", "fit: outer rate"):
      assert "The program of process 1 is not that of process 0: learning rates" in found[name]
    assert found["fit: labels"] is None
    for name, wrong in (("fit: label", 1), ("fit: label in parts", 0)):
      told = f"tasks({wrong}, 1).train: labels must lie in 0..2"
      other = "" if process == wrong else f"Process {wrong} failed, so all stop: ValueError: "
      assert found[name].startswith(other + told), found[name]
    assert found["fit: folder"].startswith("Checkpoints.folder is a folder that all processes ")
    assert found["not writable"].startswith("--out: process 0 cannot write to ")
    assert found["left"] == ["blocked", "both", "both/run", "machine0", "machine0/run"]


def test_one_process_is_like_itself(tmp_path):
  sm.check_alike({"a": 1})
  sm.check_shared("--out", tmp_path / "x")
  assert not (tmp_path / "x").exists()
