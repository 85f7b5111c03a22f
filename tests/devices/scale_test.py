"""A program gives the same numbers on any devices and processes, with one all-reduce."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments.benchmarks.hlo import collectives

TESTS = pathlib.Path(__file__).absolute().parents[1]
WORKER = TESTS / "fit_worker.py"
ENVIRONMENT = os.environ | {
  "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
  "JAX_PLATFORMS": "cpu",
}


def run(program: str, *arguments: str) -> str:
  """What a Python program prints, in a process of its own."""
  command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
  done = subprocess.run(
    command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(*arguments: object) -> subprocess.Popen[str]:
  command = [sys.executable, str(WORKER), *map(str, arguments)]
  return subprocess.Popen(
    command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finished(*processes: subprocess.Popen[str]) -> None:
  for process in processes:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


def relative(a: np.ndarray, b: np.ndarray) -> float:
  a, b = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
  if np.array_equal(a, b, equal_nan=True):  # also where sigma is infinite, or a number is not asked
    return 0.0
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
  """phi, sigma and metrics of two runs; a residual of a solve to rounding is compared as it is."""
  assert one.keys() == other.keys()
  for name in one:
    if name.startswith("opt_state") or name.endswith("seconds"):
      continue
    if name.endswith("solve_residual"):
      np.testing.assert_allclose(one[name], other[name], atol=tolerance)
    else:
      assert relative(one[name], other[name]) <= tolerance, name


MESHES = """
  import sys
  import jax
  jax.config.update("jax_num_cpu_devices", 8)
  import numpy as np
  import shrinkmeta as sm
  import fit_worker
  from tests.devices import scale_test
  from shrinkmeta.checks.validate import leaves_with_names

  def result(devices, meta_batch, algorithm="sigma_imaml", micro_batches=1):
    mesh = None if devices == 1 else sm.task_mesh(jax.devices()[:devices])
    learner, params = fit_worker.make_learner(algorithm, mesh, 8)
    rows = []
    state = sm.fit(learner, learner.init(params), fit_worker.source, 10, meta_batch=meta_batch,
                   micro_batches=micro_batches, callbacks=[sm.recorder(rows)])
    assert len(rows) == 10 and all(row["failed"] == 0 for row in rows)
    leaves = {name: np.asarray(x) for name, x in leaves_with_names(state)}
    return leaves | {f"metrics/{n}": np.array([row[n] for row in rows]) for n in rows[0]}

  jax.config.update("jax_enable_x64", True)
  for algorithm in sys.argv[1:]:
    one = result(1, 8, algorithm)
    assert one["phi/layer_1/w"].dtype == np.float64
    scale_test.compare(one, result(8, 8, algorithm), 1e-12)
    scale_test.compare(one, result(2, 8, algorithm, micro_batches=4), 1e-12)
    seven = result(1, 7, algorithm)
    assert scale_test.relative(one["phi/layer_1/w"], seven["phi/layer_1/w"]) > 1e-4
    scale_test.compare(seven, result(3, 7, algorithm), 1e-12)
  jax.config.update("jax_enable_x64", False)
  narrow = result(1, 8)
  assert narrow["phi/layer_1/w"].dtype == np.float32
  scale_test.compare(narrow, result(8, 8), 1e-6)
  print("equal")
"""


def test_any_number_of_devices_in_both_precisions():
  assert "equal" in run(MESHES, "sigma_imaml")


@pytest.mark.slow
def test_any_number_of_devices_other_rows():
  assert "equal" in run(MESHES, "maml", "reptile", "sigma_reptile", "empirical_bayes")


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("meta_batch", [8, 5])
def test_two_processes_of_four_devices(tmp_path, x64, meta_batch):
  draws = ["--batch_size", 3] if meta_batch == 5 else []  # by a typed key, in both processes
  common = ["--meta_batch", meta_batch, *draws, *(["--x64"] if x64 else [])]
  finished(start(*common, "--out", tmp_path / "one.npz"))
  port = free_port()
  distributed = ["--devices", 4, "--processes", 2, "--coordinator", f"localhost:{port}"]
  finished(
    *(start(*common, *distributed, "--process", i, "--out", tmp_path / "two.npz") for i in range(2))
  )
  one, two = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("one", "two"))
  compare(one, two, 1e-12 if x64 else 1e-6)


ONE_PROGRAM = """
  import jax
  jax.config.update("jax_num_cpu_devices", 8)
  import numpy as np
  import shrinkmeta as sm
  from jax.sharding import PartitionSpec as P
  import fit_worker
  from experiments.benchmarks.hlo import collectives
  from tests.devices import scale_test

  # Large leaves are cut over a second axis.
  rules = {"layer_1/w": P(None, "model"), "layer_0/[wb]|layer_1/b": P(), "layer_2/w": P("model")}
  states = []
  jax.config.update("jax_enable_x64", True)
  for mesh, rules in ((None, None), (sm.task_mesh(model=2), rules)):
    learner, params = fit_worker.make_learner("sigma_imaml", mesh, 16)
    state = sm.fit(learner, learner.init(params), fit_worker.source, 5, meta_batch=6, rules=rules)
    states.append(state)
  jax.config.update("jax_enable_x64", False)
  one, other = states
  for x in (other.phi, other.opt_state.phi[0].mu):
    assert x["layer_1"]["w"].addressable_shards[0].data.shape == (16, 8)
    assert x["layer_2"]["w"].addressable_shards[0].data.shape == (8, 1)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert scale_test.relative(a, b) < 1e-12
  print("cut")

  # One all-reduce, which one in the loop of the steps would add to: it sends phi and the metrics.
  mesh = sm.task_mesh()
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  for algorithm in ("sigma_imaml", "maml", "sigma_reptile"):
    learner, params = fit_worker.make_learner(algorithm, mesh, 64, 1000)
    state = sm.place_state(learner.init(params), mesh)
    tasks = sm.place_tasks(fit_worker.source(0, 16), mesh)
    new, metrics = jax.eval_shape(learner.update, state, tasks)
    compiled = jax.jit(learner.update).lower(state, tasks).compile()
    found = collectives(compiled.as_text())
    assert [kind for kind, _ in found] == ["all-reduce"], (algorithm, found)
    sent, meant = found[0][1], size((state.phi, state.log_sigma2, metrics))
    assert size(state.phi) <= sent <= 1.05 * meant, (algorithm, sent, meant)
  print("one")
"""


def test_large_leaves_are_cut_and_one_all_reduce_is_all_that_is_sent():
  assert run(ONE_PROGRAM).split()[-2:] == ["cut", "one"]


def test_collectives_are_found():
  hlo = """
    %a = f32[4,2]{1,0} all-reduce(%x), channel_id=1
    %b = (f32[3]{0}, pred[]) all-reduce-start(%x, %y)
    ROOT %c = s32[8]{0} all-gather(%a), dimensions={0}
    %d = f32[2]{0} add(%a, %a)
  """
  assert collectives(hlo) == [("all-reduce", 32), ("all-reduce", 13), ("all-gather", 32)]
