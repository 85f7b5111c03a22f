import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import shrinkmeta as sm
from shrinkmeta.devices import placement

STATE = {"phi": {"head": {"kernel": jnp.ones([4, 6]), "bias": jnp.ones(6)}}}


def mesh_of_one(*names):
  return jax.make_mesh(
    (1,) * len(names), names, (jax.sharding.AxisType.Auto,) * len(names), devices=jax.devices()[:1]
  )


def test_rules_place_by_path():
  mesh = mesh_of_one("tasks", "model")
  placed = sm.place_state(STATE, mesh, {"head/kernel": PartitionSpec(None, "model")})
  assert placed["phi"]["head"]["kernel"].sharding.spec == PartitionSpec(None, "model")
  assert placed["phi"]["head"]["bias"].sharding.spec == PartitionSpec()
  assert sm.place_state(STATE, None) is STATE


def test_a_rule_of_a_leaf_leaves_its_sigma_whole():
  """By leaf a module, and its sigma in the state, has the name of the leaf."""
  params = {"head": {"kernel": jnp.ones([4, 6])}}
  linear = sm.gaussian(lambda theta, x: x @ theta["head"]["kernel"])
  state = sm.sigma_imaml(linear, sm.by_leaf(params)).init(params)
  rules = {"head/kernel": PartitionSpec(None, "model")}
  placed = sm.place_state(state, mesh_of_one("tasks", "model"), rules)
  assert placed.phi["head"]["kernel"].sharding.spec == PartitionSpec(None, "model")
  assert placed.log_sigma2["head/kernel"].sharding.spec == PartitionSpec()


@pytest.mark.parametrize(
  ("rule", "spec", "message"),
  [
    (
      "tail",
      PartitionSpec(),
      r"No leaf .* matches the rules \['tail'\]; its leaves are \['phi/head/b",
    ),
    ("bias", PartitionSpec(None, "model"), r"cuts phi/head/bias, of shape \(6,\)"),
    ("bias", PartitionSpec("data"), r"a mesh of .* the axes must be axes of the mesh"),
  ],
)
def test_rules_that_do_not_fit(rule, spec, message):
  with pytest.raises(ValueError, match=message):
    sm.place_state(STATE, mesh_of_one("tasks", "model"), {rule: spec})


ANY: Any = sm  # for arguments of wrong types
MESH = mesh_of_one("tasks")
BATCH = sm.Batch(jnp.ones([2, 3]), jnp.ones([2, 3]))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ANY.task_mesh(4), r"devices must be a list of JAX devices.*; got 4"),
    (lambda: ANY.task_mesh(["cpu"]), r"devices must be a list of JAX devices.*; got a list of 1"),
    (lambda: ANY.task_mesh(None, 1.5), r"model must be an integer; got 1.5"),
    (
      lambda: ANY.place_state(STATE, jax.devices()),
      r"mesh must be a jax.sharding.Mesh or None; got",
    ),
    (lambda: ANY.place_state(STATE, MESH, ["bias"]), r"rules must be a dict .*; got a list of 1"),
    (
      lambda: ANY.place_state(STATE, MESH, {"bias": "model"}),
      r"rules\['bias'\] must be a jax.sharding.PartitionSpec; got 'model'",
    ),
    (lambda: ANY.share_of_tasks(4.0, MESH), r"count must be an integer of at least 1; got 4.0"),
    (lambda: ANY.share_of_tasks(4, "cpu"), r"mesh must be a jax.sharding.Mesh or None; got 'cpu'"),
    (
      lambda: ANY.place_tasks({"x": BATCH[0]}, MESH, 3),
      r"tasks must be a shrinkmeta.Task.*; got a dict",
    ),
    (
      lambda: ANY.place_tasks(sm.Task(BATCH, BATCH), 4),
      r"mesh must be a jax.sharding.Mesh or None",
    ),
    (
      lambda: ANY.place_tasks(BATCH, None, "all"),
      r"share must be an integer of at least 1; got 'all'",
    ),
    (
      lambda: ANY.program_cost(jax.jit(jnp.sum)),
      r"compiled must be .*Compile it: jax.jit\(f\).low",
    ),
  ],
)
def test_arguments_of_wrong_types(call, message):
  with pytest.raises(TypeError, match=message):
    call()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sm.task_mesh([]), r"devices is empty"),
    (lambda: sm.share_of_tasks(0, MESH), r"count must be at least 1; got 0"),
    (lambda: sm.place_tasks(BATCH, None, 4, 3), r"count is 3; .* at most the number of tasks, 2"),
    (lambda: sm.place_tasks(BATCH, None, 1), r"share is 1, but 2 tasks came; .* x\[:1\]"),
    (lambda: sm.place_tasks(BATCH, None, 1, 1), r"share is 1, but 2 tasks came"),
    (lambda: sm.place_tasks(BATCH, MESH, 1, 0), r"share is 1, but 2 tasks came"),
  ],
)
def test_numbers_that_do_not_fit(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_small_integers_of_numpy_do_not_wrap_around():
  """Minus np.uint8(7) is 249."""
  mesh = sm.task_mesh(jax.devices()[:1])
  assert sm.share_of_tasks(np.uint8(7), mesh) == (0, 7, 7)


def test_the_batch_of_adapt_tasks_is_placed_too():
  assert sm.place_tasks({"x": jnp.ones(2)}, MESH)["x"].shape == (2,)  # and any tree, as it is
  placed = sm.place_tasks(BATCH, MESH, 3)
  np.testing.assert_array_equal(placed.mask, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_a_mesh_has_whole_rows():
  with pytest.raises(ValueError, match=r"model must divide the number of devices, 1; got 2"):
    sm.task_mesh(jax.devices()[:1], model=2)


def test_fill_tasks_adds_tasks_without_examples():
  batch = sm.Batch(jnp.arange(6.0).reshape(2, 3, 1), jnp.ones([2, 3]))
  masked = batch._replace(mask=jnp.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
  filled = placement.fill_tasks(sm.Task(batch, masked), 2, 4)
  np.testing.assert_array_equal(filled.train.inputs[:2], batch.inputs)
  np.testing.assert_array_equal(filled.train.inputs[3], batch.inputs[1])
  np.testing.assert_array_equal(filled.train.mask, [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(filled.val.mask, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
  none = placement.fill_tasks(sm.Task(batch, None), 0, 3)
  assert none.val is None and float(none.train.mask.sum()) == 0.0


def test_a_process_alone_reads_all_tasks():
  mesh = sm.task_mesh(jax.devices()[:1])
  assert placement.share_of_tasks(7, mesh) == (0, 7, 7) == placement.share_of_tasks(7, None)


def test_all_processes_have_masks_where_one_fills_up(monkeypatch):
  """Their programs must be one."""
  batch = sm.Batch(np.ones((4, 3, 2)), np.ones((4, 3)))
  assert placement.place_tasks(sm.Task(batch, batch), None, 4).train.mask is None
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  placed = placement.place_tasks(sm.Task(batch, batch), None, 4)
  assert placed.train.mask.shape == (4, 3) and bool(jnp.all(placed.val.mask == 1.0))


@pytest.mark.parametrize("model", (1, 2))
def test_processes_have_their_places_side_by_side(model, monkeypatch):
  """Devices in the order of a ring through a torus, where each host has a 2 x 2 block."""
  fields = ("id", "process_index", "platform", "device_kind")
  device = dataclasses.make_dataclass("Device", fields, frozen=True)
  ring = [0, 1, 2, 3, 7, 6, 5, 9, 10, 11, 15, 14, 13, 12, 8, 4]
  devices = [device(i, i // 8 * 2 + i % 4 // 2, "tpu", "TPU v5 lite") for i in ring]
  mesh = sm.task_mesh(devices, model)
  assert mesh.axis_names == (("tasks",) if model == 1 else ("tasks", "model"))
  assert {d.id for d in mesh.devices.ravel()} == set(range(16))
  firsts = []
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    first, mine, share = placement.share_of_tasks(16, mesh)
    assert (mine, share) == (4, 4)
    firsts.append(first)
  assert firsts == [0, 4, 8, 12]


def test_placed_arrays_do_not_share_numpys_memory():
  room = np.zeros(64 * 64 + 16, np.float32)
  first = -room.ctypes.data % 64 // 4
  aligned = room[first : first + 64 * 64].reshape(64, 64)  # JAX may take such memory as it is
  assert aligned.ctypes.data % 64 == 0
  mesh = sm.task_mesh(jax.devices()[:1])
  state = sm.place_state({"w": aligned}, mesh)
  tasks = sm.place_tasks(sm.Task(sm.Batch(aligned, aligned), None), mesh)
  aligned[:] = 1.0
  assert all(float(x.max()) == 0.0 for x in jax.tree.leaves((state, tasks)))


def test_tasks_that_do_not_fit_the_devices():
  mesh = types.SimpleNamespace(shape={"tasks": 2}, axis_names=("tasks",))
  batch = sm.Batch(jnp.ones((3, 4)), jnp.ones((3, 4)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "check_mesh", lambda mesh: None)
    with pytest.raises(ValueError, match="3 tasks cannot be split .* 2 devices.*share=4"):
      sm.place_tasks(sm.Task(batch, batch), mesh)
