from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shrinkmeta as sm
from shrinkmeta.model import modules


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, name="head")(nn.relu(nn.Dense(3, name="body")(x)))


class Affine(NamedTuple):
  w: jax.Array
  b: jax.Array


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(2, 3, rngs=rngs)
    self.head = nnx.Linear(3, 1, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.body(x)))


def test_labels_of_flax_linen():
  params = Net().init(jax.random.key(0), jnp.ones([1, 2]))
  assert sm.by_layer(params) == {
    "params": {
      "body": {"kernel": "params/body", "bias": "params/body"},
      "head": {"kernel": "params/head", "bias": "params/head"},
    }
  }
  assert sm.by_leaf(params)["params"]["body"]["bias"] == "params/body/bias"
  rules = {"head/": "head", "kernel": "kernels", ".*": "rest"}  # the first rule that matches wins
  labels = sm.by_path(params, rules)["params"]
  assert labels["head"] == {"kernel": "head", "bias": "head"}
  assert labels["body"] == {"kernel": "kernels", "bias": "rest"}


def test_labels_of_named_tuples_and_lists():
  params = [Affine(jnp.ones([2]), jnp.ones([])), {"out": Affine(jnp.ones([2]), jnp.ones([]))}]
  assert sm.by_layer(params) == [Affine("0", "0"), {"out": Affine("1/out", "1/out")}]
  assert sm.by_leaf(params) == [Affine("0/w", "0/b"), {"out": Affine("1/out/w", "1/out/b")}]
  assert sm.by_layer({"scale": jnp.ones([])}) == {"scale": "scale"}  # no parent: its own module


def test_names_are_in_network_order():
  labels = {f"layer_{i}": f"layer_{i}" for i in (10, 9, 2)}
  assert modules.names(labels) == ("layer_2", "layer_9", "layer_10")


def test_spread_and_gather_are_transposes():
  labels = {"a": "m", "b": "n", "c": "m"}
  tree = {"a": jnp.arange(3.0), "b": jnp.ones([2, 2]), "c": jnp.asarray(5.0)}
  values = {"m": jnp.asarray(2.0), "n": jnp.asarray(-3.0)}
  gathered = modules.gather(tree, labels)
  assert gathered == {"m": 8.0, "n": 4.0}
  spread = modules.spread(values, labels)
  left = sum(jnp.sum(spread[k] * tree[k]) for k in tree)
  assert left == sum(values[m] * gathered[m] for m in values)


def test_path_without_rule():
  params = {"conv": {"w": 1.0}, "out": {"w": 1.0}}
  with pytest.raises(ValueError, match=r"'out/w'.*\['conv'\].*Add a rule"):
    sm.by_path(params, {"conv": "body"})


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ({"a": {"w": "m"}}, r"'b' is in params and not in labels"),
    ({"a": {"w": "m"}, "b": "m", "c": "m"}, r"'c' is in labels and not in params"),
  ],
)
def test_labels_that_do_not_fit(labels, message):
  params = {"a": {"w": jnp.ones([2])}, "b": jnp.ones([])}
  with pytest.raises(ValueError, match=message):
    modules.check_labels(labels, params)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"m": 0.0}, r"log_sigma2 has no entry for module 'n' \(parameter 'b'\)"),
    ({"m": 0.0, "n": 0.0, "o": 0.0}, r"log_sigma2 has an entry for 'o', which is no module"),
    ({"mm": 0.0}, r"has an entry for 'mm', which is no module; they are \('m', 'n'\)"),  # misspelt
    ({"m": 0.0, "n": jnp.zeros([2])}, r"log_sigma2\['n'\] must be a scalar; its shape is \(2,\)"),
    ({"m": 0.0, "n": jnp.nan}, r"log_sigma2\['n'\] is NaN"),
  ],
)
def test_a_wrong_quantity_per_module(values, message):
  with pytest.raises(ValueError, match=message):
    modules.check_modules("log_sigma2", values, {"a": "m", "b": "n"})


ANY: Any = modules  # for arguments of wrong types


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ({"a": {"w": "m"}, "b": 3}, r"labels/b must be a string.*got 3"),
    ("m", r"structure of the parameters; got the string 'm'.*by_path\(params, {\"\.\*\": 'm'}\)"),
    ({"a": {"w": jnp.ones([2])}, "b": jnp.ones([])}, r"labels/a/w must .* float32\[2\].*by_layer"),
    (sm.by_layer, r"labels must be a string.*; got the function by_layer"),
  ],
)
def test_what_are_no_labels(labels, message):
  with pytest.raises(TypeError, match=message):
    modules.check_labels(labels, {"a": {"w": jnp.ones([2])}, "b": jnp.ones([])})


def test_labels_in_other_containers():
  with pytest.raises(
    TypeError, match=r"the containers differ; labels is a tuple of 1 .* a list of"
  ):
    modules.check_labels(("m",), [jnp.ones([2])])
  params = Affine(jnp.ones([2]), jnp.ones([]))
  with pytest.raises(
    TypeError,
    match=r"labels is a dict .*, params is .*Affine.* Write the labels in the containers of params",
  ):
    modules.check_labels({"w": "w", "b": "b"}, params)
  modules.check_labels(Affine("w", "b"), params)
  modules.check_labels("m", jnp.ones([2]))  # the parameters may be one array
  modules.check_labels({"a": "m", "b": None}, {"a": jnp.ones([2]), "b": None})


@pytest.mark.parametrize("make", [sm.by_leaf, sm.by_layer, lambda p: sm.by_path(p, {".*": "m"})])
def test_labels_are_made_of_parameters_alone(make):
  for params in (Mlp(nnx.Rngs(0)), Net(), {"a": "m"}, None, [jnp.ones([2]), len]):
    with pytest.raises(TypeError, match=r"params\S* must be an? .*; got"):
      make(params)
  shapes = jax.eval_shape(lambda: {"a": jnp.ones([2])})
  assert jax.tree.structure(make(shapes)) == jax.tree.structure(make({"a": 1.0}))


@pytest.mark.parametrize(
  ("rules", "error", "message"),
  [
    (["conv"], TypeError, r"rules must be a dict .*; got a list of 1 items"),
    ({"conv": 3}, TypeError, r"rules\['conv'\] must be a string, the name of a module; got 3"),
    ({3: "conv"}, TypeError, r"a key of rules must be a regular expression; got 3"),
    ({"(": "conv"}, ValueError, r"a key of rules: '\(' is not a regular expression"),
  ],
)
def test_what_are_no_rules(rules, error, message):
  with pytest.raises(error, match=message):
    sm.by_path({"conv": 1.0}, rules)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (0.0, r"log_sigma2 must be a dict {module: scalar}; got 0.0. Write {'m': 0.0, ...}"),
    (jnp.zeros([2]), r"log_sigma2 must be a dict .*; got an array float32\[2\]"),
    ([0.0, 0.0], r"log_sigma2 must be a dict .*; got a list of 2 items"),
    ({"m": 0.0, "n": "0.3"}, r"log_sigma2\['n'\] must be a number; got '0.3'"),
    ({"m": 0.0, "n": None}, r"log_sigma2\['n'\] must be a number; got None"),
  ],
)
def test_what_is_no_quantity_per_module(values, message):
  with pytest.raises(TypeError, match=message):
    modules.check_modules("log_sigma2", values, {"a": "m", "b": "n"})


def test_names_with_digits_that_are_no_decimals():
  labels = {name: name for name in ("x10", "x1²", "x2", "①", "σ²", "x٣")}
  assert set(modules.names(labels)) == set(labels)
  assert [name for name in modules.names(labels) if name in ("x10", "x1²", "x2")] == [
    "x1²",
    "x2",
    "x10",
  ]


def test_a_summary_of_parameters_with_a_none_leaf():
  """A layer without bias; adapt_tasks returns None for the frozen module as well."""
  params = {"w": jnp.zeros(2), "b": jnp.zeros([]), "unused": None}
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
  learner = sm.sigma_imaml(
    likelihood,
    sm.by_leaf(params),
    init_sigma={"w": 0.3, "b": 0.0},
    inner=sm.Inner(optax.sgd(0.1), 5),
  )
  state = learner.init(params)
  thetas, _ = jax.jit(learner.adapt_tasks)(state, sm.Batch(jnp.ones((3, 4, 2)), jnp.ones((3, 4))))
  b, w = sm.module_summary(learner.labels, state.phi, state.log_sigma2, thetas)
  assert (b.name, b.moved, w.name) == ("b", 0.0, "w")
  np.testing.assert_allclose(w.moved, np.sqrt(jnp.mean(jnp.square(thetas["w"]))), rtol=1e-5)
  assert w.moved > 0


def test_sizes_and_squares_that_overflow():
  """Three leaves of 2^30 parameters, which take no memory, and 16-bit squares of 100,000."""
  phi = {f"l{i}": np.broadcast_to(np.float32(0), (2**15, 2**15)) for i in range(3)}
  (found,) = sm.module_summary(dict.fromkeys(phi, "m"), phi, {"m": 0.0})
  assert found.size == 3 * 2**30
  phi = {"w": jnp.zeros(100_000, jnp.float16)}
  far = {"w": jnp.full((2, 100_000), 300.0, jnp.float16)}
  moved = sm.module_summary({"w": "m"}, phi, {"m": 0.0}, far)[0].moved
  np.testing.assert_allclose(moved, 300.0, rtol=1e-6)


def test_what_is_no_summary():
  format_summary: Any = sm.format_summary
  summary = sm.ModuleSummary("body", 1, 0.0, 0.0)
  with pytest.raises(TypeError, match=r"summaries must be .*; got ModuleSummary"):
    format_summary(summary)
  with pytest.raises(TypeError, match=r"summaries\[1\] must be a shrinkmeta.ModuleSummary; got 3"):
    format_summary([summary, 3])


def test_summary_compiles_one_program_for_all_leaves(caplog):
  phi = {f"w{i}": np.zeros([3, i + 1], np.float32) for i in range(5)}
  thetas = {name: np.ones([7, *x.shape], np.float32) for name, x in phi.items()}
  with jax.log_compiles():
    rows = sm.module_summary(sm.by_leaf(phi), phi, dict.fromkeys(phi, 0.0), thetas)
  assert [row.moved for row in rows] == [1.0] * 5
  assert sum("Finished XLA compilation" in record.getMessage() for record in caplog.records) == 1


def test_summary_of_an_empty_module():
  phi = {"none": np.zeros([0]), "one": np.zeros([1])}
  thetas = {"none": np.zeros([2, 0]), "one": np.ones([2, 1])}
  none, one = sm.module_summary(sm.by_leaf(phi), phi, {"none": 0.0, "one": 0.0}, thetas)
  assert np.isnan(none.moved) and one.moved == 1.0


def test_summary_by_hand():
  phi = {"body": {"w": jnp.zeros([2, 2]), "b": jnp.zeros([2])}, "head": jnp.ones([3])}
  thetas = {
    "body": {"w": jnp.full([2, 2, 2], 0.5), "b": jnp.zeros([2, 2])},
    "head": jnp.stack([jnp.ones([3]), jnp.ones([3]) + jnp.array([3.0, 0.0, 4.0])]),
  }
  labels = sm.by_layer(phi)
  log_sigma2 = {"body": 2 * np.log(0.3), "head": -jnp.inf}
  body, head = sm.module_summary(labels, phi, log_sigma2, thetas)
  # body: 4 of 6 entries moved by 0.5; head: squares 9 and 16 over 2 tasks and 3 entries.
  assert (body.name, body.size, head.name, head.size) == ("body", 6, "head", 3)
  np.testing.assert_allclose([body.sigma, head.sigma], [0.3, 0.0], rtol=1e-6)
  np.testing.assert_allclose([body.moved, head.moved], [(1 / 6) ** 0.5, (25 / 6) ** 0.5], rtol=1e-6)
  unmoved = sm.module_summary(labels, phi, log_sigma2)
  assert all(row.moved is None for row in unmoved) and "rms" not in sm.format_summary(unmoved)
  cut = sm.module_summary(labels, phi, log_sigma2, {**thetas, "head": None})  # of adapt_tasks
  assert (cut[0], cut[1].moved) == (body, 0.0)
  with pytest.raises(ValueError, match=r"thetas/head has shape \(3,\).*leading axis T"):
    sm.module_summary(labels, phi, log_sigma2, {**thetas, "head": phi["head"]})


def test_an_nnx_state_goes_all_the_way():
  graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)
  labels = sm.by_layer(params)
  assert modules.names(labels) == ("body", "head")
  assert jax.tree.structure(labels) == jax.tree.structure(params)
  assert jax.tree.leaves(sm.by_leaf(params)) == [
    "body/bias",
    "body/kernel",
    "head/bias",
    "head/kernel",
  ]
  likelihood = sm.gaussian(lambda theta, x: nnx.merge(graph, theta)(x))
  learner = sm.sigma_imaml(
    likelihood, labels, inner=sm.Inner(optax.sgd(0.1), 5), init_sigma={"body": 0.0, "head": 0.5}
  )
  x = jax.random.normal(jax.random.key(1), (2, 4, 2))
  batch = sm.Batch(x, jnp.sum(x, -1, keepdims=True))
  state = learner.init(params)

  @jax.jit
  def run(state):
    new, metrics = learner.update(state, sm.Task(batch, batch))
    return new, metrics, learner.adapt(new, jax.tree.map(lambda a: a[0], batch))[0]

  new, metrics, theta = run(state)
  assert jax.tree.structure(new.phi) == jax.tree.structure(params)
  assert metrics.num_failed == 0
  moved = {n: float(jnp.abs(theta[n].kernel[...] - new.phi[n].kernel[...]).max()) for n in theta}
  assert moved["body"] == 0.0 and moved["head"] > 0.0
  summary = sm.module_summary(labels, new.phi, new.log_sigma2)
  assert [(row.name, row.size) for row in summary] == [("body", 9), ("head", 4)]


def test_a_summary_of_traced_values_is_refused():
  with pytest.raises(TypeError, match="module_summary returns numbers, so it runs outside jit"):
    jax.jit(lambda v: sm.module_summary({"w": "w"}, {"w": jnp.zeros(2)}, {"w": v}))(0.0)
