"""Rows of different tasks in one batch each equal their task alone; frozen layers run once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.serving.deltas import deltas
from shrinkmeta.serving.predict import predict_tasks
from tests.adapters.attach_test import subjaxprs
from tests.devices.scale_test import run
from tests.serving.deltas_test import LEARNER, LIKELIHOOD, PARAMS, STATE, owned

OWN = owned(["a", "b", "c", "d"])
INDEX = np.array([2, 0, 0, 3, 1, 2], np.int32)
X = jax.random.normal(jax.random.key(1), (6, 3))


def one_by_one(likelihood, state, own, index, inputs):
  def row(n, t):
    theta = sm.merge(jax.tree.map(lambda x: x[t], own.thetas), state.phi)
    return likelihood.predict(theta, jax.tree.map(lambda x: x[n : n + 1], inputs))

  rows = [row(n, int(t)) for n, t in enumerate(index)]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def test_rows_are_those_of_their_tasks():
  got = predict_tasks(LIKELIHOOD, STATE, OWN, INDEX, X)
  np.testing.assert_allclose(got, one_by_one(LIKELIHOOD, STATE, OWN, INDEX, X), atol=1e-6)
  np.testing.assert_array_equal(got, predict_tasks(LIKELIHOOD, STATE.phi, OWN, INDEX, X))
  assert got.shape == (6, 2)


def test_one_program_serves_every_mixture():
  traced = []

  @jax.jit
  def serve(state, own, index, inputs):
    traced.append(index)
    return predict_tasks(LIKELIHOOD, state, own, index, inputs)

  for seed in range(3):
    index = np.random.RandomState(seed).randint(0, 4, 6)
    got = serve(STATE, owned(["a", "b", "c", str(seed)]).anonymous(), index, X)
    np.testing.assert_allclose(got, one_by_one(LIKELIHOOD, STATE, OWN, index, X), atol=1e-6)
  assert len(traced) == 1
  outside = serve(STATE, OWN.anonymous(), jnp.array([0, -1, 4, 1, 2, 3]), X)
  assert np.isnan(outside).all(1).tolist() == [False, True, True, False, False, False]


def test_gradients_are_those_of_one_by_one():
  def loss(predict):
    square = lambda phi, thetas, x: jnp.sum(
      predict(LIKELIHOOD, STATE._replace(phi=phi), jax.tree.unflatten(tree, thetas), INDEX, x) ** 2
    )
    leaves, tree = jax.tree.flatten(OWN)
    return jax.grad(square, (0, 1, 2))(STATE.phi, leaves, X)

  got, want = loss(predict_tasks), loss(one_by_one)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
  assert np.abs(got[0]["body"]["w"]).max() > 0 and np.abs(got[1][0]).max() > 0


def test_a_frozen_dense_layer_is_one_product_of_the_whole_batch():
  f = lambda *arguments: predict_tasks(LIKELIHOOD, *arguments)
  jaxpr = jax.make_jaxpr(f)(STATE, OWN, INDEX, X)
  dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  batch_axes = [e.params["dimension_numbers"][1] for e in dots]
  sizes = [[v.aval.shape for v in e.invars] for e in dots]
  assert batch_axes == [((), ()), ((0,), (0,))]  # the body without, the head with an axis of rows
  assert sizes[0][1] == (3, 4) and np.prod(sizes[0][0]) == 6 * 3
  assert sizes[1][1] == (6, 4, 2)
  text = jax.jit(f).lower(STATE, OWN, INDEX, X).compile().as_text()
  assert text.count(" dot(") + text.count("__onednn") <= 2


def in_layers(settings):
  """A network with stacked layers; other parameters are in the carry and constants of its scan."""

  @jax.jit
  def network(p, x):
    step = lambda carry, w: ((jnp.tanh(carry[0] @ w + p["first"][0]), carry[1]), carry[0].sum())
    (h, first), each = jax.lax.scan(step, (x @ p["first"], p["first"]), p["layers"], **settings)
    return h + first[1], jnp.broadcast_to(each, [len(x), 4])

  return network


@pytest.mark.parametrize("settings", [{}, {"reverse": True}, {"unroll": 2}], ids=str)
def test_a_network_that_scans_over_layers(settings):
  likelihood = sm.Likelihood(in_layers(settings), lambda outputs, y: outputs[0].sum(-1))
  params = {"first": jnp.zeros([3, 5]), "layers": jnp.zeros([4, 5, 5])}
  learner = sm.maml(likelihood, sm.by_leaf(params))
  state = learner.init(params)
  keys = dict(zip(params, jax.random.split(jax.random.key(3)), strict=True))
  thetas = {name: jax.random.normal(keys[name], (40, *x.shape)) for name, x in params.items()}
  own = deltas(learner, state, thetas, range(40))
  index = np.array([2, 39, 39, 0, 17, 2], np.int8)
  f = jax.jit(lambda *arguments: predict_tasks(likelihood, *arguments))
  got, want = f(state, own.anonymous(), index, X), one_by_one(likelihood, state, own, index, X)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize(
  ("settings", "alpha", "held"),
  [({}, None, True), ({"reverse": True}, 3.0, False), ({"unroll": 2}, 3.0, True)],
)
def test_a_scan_gathers_adapters_one_layer_at_a_time(settings, alpha, held, optimising_jit):
  base = {"first": jnp.ones([3, 5]), "layers": jax.random.normal(jax.random.key(4), (4, 5, 5))}
  network = lambda p, x: in_layers(settings)(p | {"first": base["first"]}, x)[0]
  likelihood = sm.Likelihood(sm.lora.attach(network, alpha), lambda outputs, y: outputs.sum(-1))
  adapters, constants = sm.lora.init(jax.random.key(5), base, {"layers": 2}), base
  if held:
    adapters, a = sm.lora.hold_A(adapters)
    constants = sm.lora.Base(base, a)
  learner = sm.maml(likelihood, sm.lora.labels(adapters))
  state = learner.init(adapters, constants=constants)
  thetas = jax.tree.map(lambda x: jax.random.normal(jax.random.key(6), (70, *x.shape)), adapters)
  own = deltas(learner, state, thetas, range(70))
  index = np.array([2, 69, 69, 0, 1, 2], np.int8)  # 70 tasks of 4 layers are more than int8 holds

  def merged(thetas, index, x):
    def row(t, x):
      theta = jax.tree.map(lambda x: x[t], thetas)
      return network(sm.lora.merge(constants, theta, alpha), x[None])[0]

    return jnp.stack([row(t, x[n]) for n, t in enumerate(index)])

  f = optimising_jit(lambda own, index, x: predict_tasks(likelihood, state, own, index, x))
  got = f(own.anonymous(), index, X)
  np.testing.assert_allclose(got, merged(thetas, index, X), rtol=1e-4, atol=1e-5)
  outside = np.array(f(own.anonymous(), np.array([0, -1, 70, 2**30, 2**30 + 1, 3]), X))
  assert np.isnan(outside).all(1).tolist() == [False, True, True, True, True, False]
  text = f.lower(own.anonymous(), index, X).compile().as_text()
  assert "[70,4,2,5]" in text  # the table of B
  gathered = ("[6,4,5,2]", "[4,6,5,2]", "[6,4,2,5]", "[4,6,2,5]")
  assert not [shape for shape in gathered if shape in text]

  def gradient(predict):
    return jax.jit(jax.grad(lambda thetas: jnp.sum(predict(thetas) ** 2)))

  new = lambda thetas: dataclasses.replace(own.anonymous(), thetas=thetas)
  found = gradient(lambda thetas: predict_tasks(likelihood, state, new(thetas), index, X))
  # No step of a loop adds to an array of the size of a table.
  jaxprs = list(subjaxprs(found.trace(thetas).jaxpr.jaxpr))
  scans = [eqn for jaxpr in jaxprs for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  assert scans and not [v for eqn in scans for v in eqn.outvars if 70 in v.aval.shape]
  want = gradient(lambda thetas: merged(thetas, index, X))(thetas)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, found(thetas), want)


def conv(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_a_frozen_convolution_is_not_grouped():
  keys = jax.random.split(jax.random.key(2), 4)
  params = {
    "conv_0": jax.random.normal(keys[0], (3, 3, 2, 4)) / 4,
    "conv_1": jax.random.normal(keys[1], (3, 3, 4, 4)) / 6,
    "conv_2": jax.random.normal(keys[2], (3, 3, 4, 2)) / 6,
  }

  def predict(p, x):
    for name in params:
      x = jnp.tanh(conv(x, p[name]))
    return x.mean((1, 2))

  likelihood = sm.gaussian(predict, scale=1.0)
  learner = sm.hand_picked(likelihood, sm.by_leaf(params), task_specific=["conv_1"])
  state = learner.init(params)
  moved = params["conv_1"] + 0.1 * jax.random.normal(keys[3], (5, 3, 3, 4, 4))
  own = deltas(learner, state, {"conv_0": None, "conv_1": moved, "conv_2": None}, range(5))
  images, index = jax.random.normal(keys[3], (6, 7, 7, 2)), jnp.array([4, 0, 0, 3, 1, 4])
  f = lambda *arguments: predict_tasks(likelihood, *arguments)
  jaxpr = jax.make_jaxpr(f)(state, own, index, images)
  convolutions = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
  assert [e.params["feature_group_count"] for e in convolutions] == [1, 6, 1]
  assert [e.params["batch_group_count"] for e in convolutions] == [1, 1, 1]
  assert [convolutions[i].invars[1].aval.shape for i in (0, 2)] == [(3, 3, 2, 4), (3, 3, 4, 2)]
  got = f(state, own, index, images)
  np.testing.assert_allclose(got, one_by_one(likelihood, state, own, index, images), atol=1e-6)


def test_examples_with_axes_of_their_own_and_outputs_of_several_parts():
  """Tokens [N, S, D] with a mask [N, S]; every row normalises over its own tokens."""
  params = {"mix": jnp.eye(3), "scale": jnp.array([0.5, -0.2, 0.1])}

  def predict(p, inputs):
    x, keep = inputs["tokens"] @ p["mix"], inputs["keep"][..., None]
    x = (x - x.mean((0, 1))) * keep  # statistics of the batch, which is one row here
    return {"mean": jnp.tanh(x).sum(1) * p["scale"], "tokens": keep.sum((1, 2))}

  likelihood = sm.Likelihood(predict, lambda outputs, y: -jnp.sum((outputs["mean"] - y) ** 2, -1))
  learner = sm.hand_picked(likelihood, sm.by_leaf(params), task_specific=["scale"])
  state = learner.init(params)
  moved = params["scale"] + jnp.arange(12.0).reshape(4, 3)
  own = deltas(learner, state, {"mix": None, "scale": moved}, range(4))
  inputs = {
    "tokens": jax.random.normal(jax.random.key(3), (6, 5, 3)),
    "keep": (jnp.arange(5) < jnp.arange(6)[:, None]).astype(jnp.float32),
  }
  got = predict_tasks(likelihood, state, own, INDEX, inputs)
  want = one_by_one(likelihood, state, own, INDEX, inputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
  assert got["mean"].shape == (6, 3) and got["tokens"].shape == (6,)


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"likelihood": LIKELIHOOD.predict}, TypeError, "likelihood must be"),
    ({"deltas": OWN.thetas}, TypeError, "deltas must be"),
    ({"state": PARAMS["body"]}, ValueError, "'head/b', which is no parameter of state"),
    ({"state": {"head": PARAMS["head"]}}, TypeError, "state must be"),
    ({"index": INDEX[None]}, ValueError, r"index must be integers \[N\].*int32\[1, 6\]"),
    ({"index": INDEX * 1.0}, ValueError, "index must be integers"),
    ({"index": ["a"]}, TypeError, r"as deltas.index\(ids\) makes it; got a list of 1 items.$"),
    ({"index": INDEX - 1}, ValueError, r"index\[1\] is -1; it must be in \[0, T\) with T = 4"),
    ({"index": INDEX + 1}, ValueError, r"index\[3\] is 4"),
    ({"inputs": X[:5]}, ValueError, r"inputs must lead with N = 6.*\(5, 3\)"),
    ({"inputs": {}}, ValueError, "inputs has no arrays"),
    ({"deltas": jax.tree.map(lambda x: x[:, :1], OWN)}, ValueError, "deltas.thetas/head/b is"),
  ],
)
def test_errors_name_the_argument(change, error, message):
  given = dict(likelihood=LIKELIHOOD, state=STATE, deltas=OWN, index=INDEX, inputs=X)
  with pytest.raises(error, match=message):
    predict_tasks(**(given | change))


def test_another_phi_is_refused_outside_jit():
  other = LEARNER.init(jax.tree.map(lambda p: p + 1, PARAMS))
  with pytest.raises(ValueError, match="another phi: state.phi/body/b"):
    predict_tasks(LIKELIHOOD, other, OWN, INDEX, X)
  with pytest.raises(ValueError, match="another phi: state.phi/body/b"):
    predict_tasks(LIKELIHOOD, other.phi, OWN, INDEX, X)


def test_another_phi_is_refused_beside_a_random_key():
  """A network with dropout has a key among its constants, and a key has no value to read."""
  likelihood = sm.gaussian(lambda theta, x, constants: x * theta["w"] + theta["b"])
  learner = sm.hand_picked(likelihood, {"w": "w", "b": "b"}, task_specific=["b"])
  state = learner.init({"w": 1.0, "b": 0.0}, constants={"rng": jax.random.key(0)})
  own = deltas(learner, state, {"w": None, "b": jnp.array([1.0, 2.0])}, ["a", "b"])
  index, x = np.array([0, 1]), jnp.ones(2)
  np.testing.assert_allclose(predict_tasks(likelihood, state, own, index, x), [2.0, 3.0])
  with pytest.raises(ValueError, match="another phi: state.phi/w"):
    moved = state._replace(phi=state.phi | {"w": jnp.array(5.0)})
    predict_tasks(likelihood, moved, own, index, x)
  other = state._replace(constants={"rng": jax.random.key(1)})
  with pytest.raises(ValueError, match="state.constants/rng"):
    predict_tasks(likelihood, other, own, index, x)


def test_outputs_without_the_axis_of_rows_are_refused():
  total = sm.Likelihood(lambda p, x: jnp.sum(x @ p["body"]["w"]), lambda o, y: y)
  with pytest.raises(ValueError, match=r"must return outputs.*returned shape \(\)"):
    predict_tasks(total, STATE, OWN, INDEX, X)


def test_deltas_cut_by_task_over_two_devices():
  program = """
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    import shrinkmeta as sm
    from shrinkmeta.serving.predict import predict_tasks
    from tests.serving.predict_test import INDEX, LIKELIHOOD, OWN, STATE, X

    mesh = sm.task_mesh()
    cut = jax.device_put(OWN, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tasks")))
    assert cut.thetas["head"]["w"].addressable_shards[0].data.shape == (2, 4, 2)
    serve = jax.jit(lambda *arguments: predict_tasks(LIKELIHOOD, *arguments))
    got = serve(sm.place_state(STATE, mesh), cut, *sm.place_state((INDEX, X), mesh))
    assert len(got.sharding.device_set) == 2
    np.testing.assert_allclose(got, predict_tasks(LIKELIHOOD, STATE, OWN, INDEX, X), atol=1e-6)
    print("equal")
  """
  assert run(program) == "equal\n"


def test_explicit_axes_are_refused_by_name():
  program = """
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    import shrinkmeta as sm
    from shrinkmeta.serving.predict import predict_tasks
    from tests.serving.predict_test import INDEX, LEARNER, LIKELIHOOD, OWN, STATE, X

    sharding = jax.NamedSharding(jax.make_mesh((2,), ("tasks",)), jax.P("tasks"))
    for f in (predict_tasks, jax.jit(predict_tasks, static_argnums=0)):
      try:
        f(LIKELIHOOD, STATE, jax.device_put(OWN, sharding), INDEX, X)
      except ValueError as error:
        print(error)
    part = sm.Batch(X.reshape(2, 3, 3), jax.numpy.ones((2, 3, 2)))
    for f in (LEARNER.update, jax.jit(LEARNER.update)):
      try:
        f(STATE, jax.device_put(sm.Task(part, part), sharding))
      except ValueError as error:
        print(error)
  """
  lines = run(program).splitlines()
  assert len(lines) == 4 and all("task_mesh()" in line for line in lines)
  for i, name in enumerate(["deltas/head/b"] * 2 + ["tasks/task/train/inputs"] * 2):
    assert lines[i].startswith(f"{name} is split over explicit axes")


def test_deltas_that_lost_tasks_are_refused():
  """The ids are static, so a tree.map that takes some tasks leaves the ids of all."""
  for change in (lambda x: x[jnp.array([2, 3])], lambda x: jnp.concatenate([x, x])):
    part = jax.tree.map(change, OWN)
    with pytest.raises(ValueError, match="deltas has 4 ids, and the leading axes .*head/b"):
      part.index(["a"])
    with pytest.raises(ValueError, match="deltas has 4 ids, and the leading axes .*head/b"):
      predict_tasks(LIKELIHOOD, STATE, part, INDEX[:1], X[:1])


def test_parameters_that_are_one_array():
  likelihood = sm.gaussian(lambda w, x: x @ w)
  learner = sm.maml(likelihood, "w")
  state = learner.init(jnp.zeros(3))
  own = deltas(learner, state, jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), ["a", "b"])
  rows = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  assert predict_tasks(likelihood, state, own, np.array([1, 0]), rows).tolist() == [4.0, 4.0]
  other = learner.init(jnp.ones(3))
  with pytest.raises(ValueError, match="phi"):
    predict_tasks(likelihood, other, own, np.array([1, 0]), rows)
