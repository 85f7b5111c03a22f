import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm


def f(shared, task):
  x = task["x"]
  return {"square": shared * x**2, "count": jnp.ones([], jnp.int32)}, {"cube": x**3}


def test_vmap_is_sequential():
  x = np.arange(12.0).reshape(4, 3)
  for batching in ("vmap", "sequential"):
    total, each = sm.over_tasks(f, jnp.asarray(2.0), {"x": jnp.asarray(x)}, batching)
    np.testing.assert_allclose(total["square"], 2 * (x**2).sum(0))
    assert total["count"] == 4 and total["count"].dtype == jnp.int32
    np.testing.assert_allclose(each["cube"], x**3)


@pytest.mark.parametrize("batching", ("vmap", "sequential", 7))
def test_sums_of_sixteen_bits_do_not_saturate(batching):
  """In bfloat16 256 + 1 is 256."""
  ones = jnp.ones([1000, 2], jnp.bfloat16)
  total, each = sm.over_tasks(lambda shared, x: (shared * x, x), jnp.bfloat16(1), ones, batching)
  assert total.dtype == each.dtype == jnp.bfloat16
  np.testing.assert_array_equal(total.astype(float), 1000.0)


@pytest.mark.parametrize("batching", ("vmap", "sequential", 2))
def test_what_is_added_up_may_be_pythons_number(batching):
  total, _ = sm.over_tasks(lambda _, x: ((1, 0.5), x), 1.0, jnp.ones(5), batching)
  assert total == (5, 2.5)


@pytest.mark.parametrize(("batching", "traces"), [("vmap", 1), ("sequential", 1), (3, 1), (2, 2)])
def test_a_task_is_traced_once(batching, traces):
  """Tracing takes seconds for a network. The rest of 9 tasks in pairs is another program."""
  calls = []
  f = lambda shared, x: (calls.append(1) or shared * x, x)
  jax.jit(lambda x: sm.over_tasks(f, jnp.ones(()), x, batching)).lower(jnp.ones(9))
  assert len(calls) == traces


def test_one_task_is_not_batched():
  """A batched loop that stops early selects between old and new values of everything it carries."""

  @jax.custom_batching.custom_vmap
  def alone(x):
    return 2 * x

  @alone.def_vmap
  def _(size, batched, x):
    raise AssertionError("under vmap")

  task = lambda shared, x: (shared * alone(x), alone(x))
  total, each = sm.over_tasks(task, jnp.ones(()), jnp.ones([1, 3]), "sequential")
  assert total.tolist() == [2, 2, 2] and each.tolist() == [[2, 2, 2]]
  with pytest.raises(AssertionError, match="under vmap"):
    sm.over_tasks(task, jnp.ones(()), jnp.ones([2, 3]), "vmap")


ANY: Any = sm  # for arguments of wrong types


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda t: ANY.over_tasks(f, 1.0, t, None), r"batching must be \"auto\", .* at once; got None"),
    (lambda t: ANY.over_tasks(f, 1.0, t, 2.0), r"batching must be .* at once; got 2.0"),
    (lambda t: ANY.over_tasks(f, 1.0, t, True), r"batching must be .* at once; got True"),
    (lambda t: ANY.over_tasks(3, 1.0, t), r"f must be a function, \(shared, task\) .*; got 3"),
    (lambda t: ANY.over_tasks(f, 1.0, t, first=3), r"first must be a function, .*; got 3"),
    (lambda t: ANY.over_tasks(f, 1.0, t, mesh="cpu"), r"mesh must be a .* or None; got 'cpu'"),
    (lambda t: ANY.num_tasks({"x": 1.0}), r"tasks/x must be an array \[T, ...\]; got 1.0"),
  ],
)
def test_arguments_of_wrong_types(call, message):
  with pytest.raises(TypeError, match=message):
    call({"x": jnp.ones([3, 2])})


@pytest.mark.parametrize("batching", ["vmap", "sequential", 4])
def test_no_task_adds_up_to_zero(batching):
  found = sm.over_tasks(lambda s, x: (x, s * x), jnp.ones(2), jnp.ones((0, 2)), batching)
  assert found[0].tolist() == [0.0, 0.0] and found[1].shape == (0, 2)


def test_the_number_of_tasks_is_one():
  assert sm.num_tasks({"a": jnp.ones([3, 2]), "b": np.ones(3)}) == 3
  with pytest.raises(ValueError, match=r"tasks has no arrays; got None"):
    sm.num_tasks(None)
  with pytest.raises(
    ValueError, match=r"same axis T: tasks/a has shape \(3, 2\), tasks/b has .*\(2,"
  ):
    sm.over_tasks(f, 1.0, {"a": jnp.ones([3, 2]), "b": jnp.ones([2])})
  with pytest.raises(ValueError, match=r"same axis T: tasks has shape \(\)"):
    sm.num_tasks(jnp.ones([]))
  for batching in (0, -1):
    with pytest.raises(ValueError, match=r"a positive number of tasks at once; got (0|-1)"):
      sm.over_tasks(f, 1.0, {"x": jnp.ones([3, 2])}, batching)


def test_errors():
  tasks = {"x": jnp.ones([3, 2])}
  with pytest.raises(ValueError, match=r"tasks at once; got 'pmap'"):
    sm.over_tasks(f, 1.0, tasks, "pmap")  # pyright: ignore[reportArgumentType]
  explicit = (jax.sharding.AxisType.Explicit,)
  mesh = jax.make_mesh((1,), ("tasks",), explicit, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r"must be of type Auto; .*Explicit.*sm.task_mesh"):
    sm.over_tasks(f, 1.0, tasks, mesh=mesh)


MESHED = """
import re
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, optax
import shrinkmeta as sm
from jax.sharding import Mesh

mesh = Mesh(np.array(jax.devices()), ("tasks",))
assert mesh.size == 4
rng = np.random.default_rng(0)
batch = lambda: sm.Batch(jnp.array(rng.normal(size=(8, 5, 2))), jnp.array(rng.normal(size=(8, 5))))
tasks = sm.Task(batch(), batch())
linear = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
labels = {"w": "w", "b": "b"}
params = {"w": jnp.zeros(2), "b": jnp.zeros([])}
inner = sm.Inner(optax.sgd(0.1), 3)
for make in (sm.sigma_imaml, sm.maml):
  ends = []
  for batching, m in (("vmap", None), ("vmap", mesh), ("sequential", mesh)):
    learner = make(linear, labels, inner=inner, batching=batching, mesh=m)
    state = learner.init(params)
    compiled = jax.jit(learner.update).lower(state, tasks).compile()
    for _ in range(2):
      state, metrics = compiled(state, tasks)
    ends.append((state, metrics))
    if m is not None:
      text = compiled.as_text()
      count = lambda op: len(re.findall(rf"\\b{op}(?:-start)?\\(", text))
      assert count("all-reduce") == 1, (make, batching, count("all-reduce"))
      for op in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count(op) == 0, (make, batching, op)
  for got in ends[1:]:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(ends[0]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
# Numbers of tasks that the mesh does not divide, one of them failing; blocks that tasks leave.
tol = sm.Inner(optax.sgd(0.1), 30, tol=1e-3)
exact = sm.Implicit(tol=1e-12, max_steps=50)
joint = lambda *a, **k: sm.sigma_reptile(*a, sigma_gradient="joint", **k)
broken = tasks._replace(train=tasks.train._replace(inputs=tasks.train.inputs.at[1].set(jnp.nan)))
for make, devices, count, blocks in (
  (sm.sigma_imaml, 4, 6, 2), (sm.sigma_imaml, 4, 1, None), (joint, 3, 7, None),
  (sm.empirical_bayes, 4, 6, None),
):
  data = tasks if make is sm.empirical_bayes else broken
  some = jax.tree.map(lambda x: x[:count], data)
  found = []
  for m in (None, sm.task_mesh(jax.devices()[:devices])):
    for batching in ("vmap", blocks) if blocks and m else ("vmap",):
      learner = make(linear, labels, inner=tol, implicit=exact, batching=batching, mesh=m)
      found.append(jax.jit(learner.update)(learner.init(params), some))
  failing = int(data is broken and count > 1)
  assert found[0][1].val_nll.shape == (count,) and int(found[0][1].num_failed) == failing
  for got in found[1:]:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(found[0]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
# Integers are added up as integers, on every mesh, and a mesh of two axes needs no jit.
two = sm.task_mesh(model=2)
for m in (None, mesh, two):
  for batching in ("vmap", "sequential", 2):
    big = 2**24 + 1  # float32 would lose the 1
    ints = lambda x: {"positive": x >= 0, "small": jnp.int8(100), "big": 0 * x.astype(int) + big}
    f = lambda shared, x: ({**ints(x), "real": x}, x)
    total, _ = sm.over_tasks(f, jnp.ones(()), jnp.arange(8.0), batching, m)
    found = {name: float(x) for name, x in total.items()}
    assert found == {"positive": 8, "small": 800, "big": 8 * big, "real": 28}, (m, batching, found)
    assert jnp.issubdtype(total["positive"].dtype, jnp.integer)
  calls = []
  f = lambda shared, x: (calls.append(1) or shared * x, x)
  jax.jit(lambda x: sm.over_tasks(f, jnp.ones(()), x, "sequential", m)).lower(jnp.ones(8))
  assert len(calls) == 1, (m, calls)
one = sm.maml(linear, labels, inner=inner).update(state, tasks)[0]
learner = sm.maml(linear, labels, inner=inner, mesh=two)
placed = sm.place_state(state, two)
np.testing.assert_allclose(learner.update(placed, tasks)[0].phi["w"], one.phi["w"], rtol=1e-6)
assert learner.adapt_tasks(placed, tasks.train)[0]["w"].shape == (8, 2)
print("passed")
"""


def test_a_mesh_is_one_device_and_one_sum():
  """Four CPU devices, in a program of its own: equal states, and one all-reduce an update."""
  root = str(pathlib.Path(__file__).absolute().parents[2])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(MESHED)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert run.returncode == 0 and "passed" in run.stdout, run.stderr


ORDERED = """
import hashlib
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import shrinkmeta as sm

f = lambda shared, x: ({"a": x > 0, "b": x, "c": x.astype(jnp.float16)}, x)
run = lambda x: sm.over_tasks(f, jnp.ones(()), x, "vmap", sm.task_mesh())
text = jax.jit(run).lower(jnp.arange(4.0)).as_text()
assert text.count("all_reduce") >= 2
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_all_processes_send_their_sums_in_one_order():
  """A set has another order in every process: they would wait for each other for ever."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  environment["PYTHONPATH"] = str(pathlib.Path(__file__).absolute().parents[2])
  found = set()
  for seed in ("1", "2", "3", "4"):
    command = [sys.executable, "-c", ORDERED]
    settings = environment | {"PYTHONHASHSEED": seed}
    done = subprocess.run(
      command, env=settings, capture_output=True, text=True, timeout=300, check=True
    )
    found.add(done.stdout)
  assert len(found) == 1
