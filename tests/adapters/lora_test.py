"""Adapters as pytrees: draws, labels, layers, held A, and wrong arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.adapters import lora
from tests.adapters.networks import KEY, problem, random_like

W = {"w": jnp.ones([3, 3]), "v": jnp.ones([3, 3])}


def test_a_is_orthonormal_and_b_is_zero():
  params = {
    "dense": jnp.ones([9, 4]),
    "conv": jnp.ones([3, 3, 2, 5]),
    "layers": jnp.ones([2, 6, 4]),
  }
  params |= {"torch": jnp.ones([4, 9]), "heads": jnp.ones([6, 2, 3]), "bias": jnp.ones([4])}
  rules = {"torch": (3, "oi"), "heads": (2, "ioo"), "dense|conv|layers": 3}
  adapters = lora.init(KEY, params, rules)
  assert jax.tree.map(jnp.shape, adapters) == {
    "dense": {"A": (9, 3), "B": (3, 4)},
    "conv": {"A": (3, 3, 2, 3), "B": (3, 5)},
    "layers": {"A": (2, 6, 3), "B": (2, 3, 4)},
    "torch": {"A": (3, 9), "B": (4, 3)},
    "heads": {"A": (6, 2), "B": (2, 2, 3)},
  }
  assert not any(kernel["B"].any() for kernel in adapters.values())
  flat = lambda a: a.reshape(-1, a.shape[-1])
  for a in (adapters["dense"]["A"], flat(adapters["conv"]["A"]), adapters["torch"]["A"].T):
    np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-6)
  first, second = adapters["layers"]["A"]
  np.testing.assert_allclose(second.T @ second, np.eye(3), atol=1e-6)
  assert jnp.abs(first - second).max() > 0.1
  b = random_like(adapters["conv"]["B"])
  merged = lora.merge({"conv": params["conv"]}, {"conv": {**adapters["conv"], "B": b}}, alpha=6.0)
  norm = jnp.linalg.norm(merged["conv"] - params["conv"])  # |Delta W| = (alpha / r) |B|
  np.testing.assert_allclose(norm, 2.0 * jnp.linalg.norm(b), rtol=1e-5)
  halves = lora.init(KEY, params, {"dense": 3}, dtype=jnp.bfloat16)["dense"]
  assert halves["A"].dtype == halves["B"].dtype == jnp.bfloat16


def test_held_a_is_a_constant():
  predict, params, x, adapters = problem("dense")
  moving, fixed = lora.hold_A(adapters)
  assert jax.tree.leaves(lora.labels(moving)) == ["params/body/kernel", "params/head/kernel"]
  got = lora.attach(predict)(moving, x, lora.Base(params, fixed))
  np.testing.assert_array_equal(got, lora.attach(predict)(adapters, x, params))
  for one, two in zip(
    jax.tree.leaves(lora.merge(lora.Base(params, fixed), moving)),
    jax.tree.leaves(lora.merge(params, adapters)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)
  with pytest.raises(ValueError, match=r"'params/body/kernel' has no 'A'.*lora.Base"):
    lora.attach(predict)(moving, x, params)
  with pytest.raises(ValueError, match="Both trees of adapters have 'B'"):
    lora.join(moving, moving)


def test_labels_name_kernels_and_layers():
  predict, params, x, adapters = problem("linen scan")
  split = lora.split_layers(adapters)
  kernel = "params/layers/dense/kernel"
  assert set(jax.tree.leaves(lora.labels(adapters))) == {kernel}
  assert set(jax.tree.leaves(lora.labels(split))) == {f"{kernel}/[{n}]" for n in range(3)}
  assert lora.labels(split) == sm.by_layer(split)
  rules = {r"\[0\]": "first", ".*": "rest"}
  assert set(jax.tree.leaves(sm.by_path(split, rules))) == {"first", "rest"}
  assert jax.tree.leaves(lora.labels(adapters, train_A=False)) == ["A", kernel]
  np.testing.assert_array_equal(
    lora.attach(predict)(split, x, params), lora.attach(predict)(adapters, x, params)
  )
  stacked = lora.stack_layers(split)
  jax.tree.map(np.testing.assert_array_equal, stacked, adapters)
  del split["params"]["layers"]["dense"]["kernel"]["[1]"]
  with pytest.raises(ValueError, match=r"layers \[0, 2\]; expected every layer"):
    lora.attach(predict)(split, x, params)
  with pytest.raises(ValueError, match=r"paths: '\*' is not a regular expression"):
    lora.split_layers(adapters, "*")
  one, two = ({"A": jnp.ones([5, r]), "B": jnp.ones([r, 3])} for r in (1, 2))
  with pytest.raises(ValueError, match=r"'dense/w' have 'A' of shapes \[\(5, 1\), \(5, 2\)\]"):
    lora.stack_layers({"dense": {"w": {"[0]": one, "[1]": two}}})


def test_a_learner_moves_adapters_only():
  predict, params, x, _ = problem("dense")
  adapters = lora.init(KEY, params, {"kernel": 2})
  attached = lora.attach(predict)
  likelihood = sm.gaussian(lambda theta, x: attached(theta, x, params), 0.1)
  batch = sm.Batch(jnp.stack([x] * 2), jnp.stack([jnp.ones([4, 3]), -jnp.ones([4, 3])]))
  learner = sm.sigma_maml(likelihood, lora.labels(adapters))
  state = learner.init(adapters)
  state, metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))
  assert sorted(state.log_sigma2) == ["params/body/kernel", "params/head/kernel"]
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.phi))


def test_dropout_with_adapters():
  """As the docstring of `attach` says."""

  def net(p, x, key=None):
    keep = 1.0 if key is None else jax.random.bernoulli(key, 0.5, x.shape) * 2.0
    return (x * keep) @ p["w"]

  adapters = random_like(lora.init(KEY, W, {"w": 1}))
  predict = lambda a, x, c, key=None: lora.attach(lambda p, x: net(p, x, key))(a, x, c)
  likelihood, x = sm.with_randomness(sm.gaussian(predict)), jnp.ones([2, 3])
  whole = lora.merge(W, adapters)
  for key in (None, KEY):
    np.testing.assert_allclose(predict(adapters, x, W, key), net(whole, x, key), rtol=1e-5)
  batch = sm.Batch(jnp.stack([x] * 2), jnp.ones([2, 2, 3]))
  learner = sm.sigma_maml(likelihood, lora.labels(adapters))
  state = learner.init(adapters, constants=W)
  update = jax.jit(learner.update)
  _, metrics = update(state, sm.Task(batch, batch), key=KEY)
  _, other = update(state, sm.Task(batch, batch), key=jax.random.key(1))
  assert metrics.num_failed == 0
  assert (metrics.task_grad_norm != other.task_grad_norm).all()


@pytest.mark.parametrize(
  ("rules", "error", "message"),
  [
    (
      {"kernel": 2},
      ValueError,
      r"rules has 'kernel', .* no path.*\['a', 'bias', 'deep', 'heads'\]",
    ),
    (
      {"^a": 1, "a$": 2},
      ValueError,
      r"rules has 'a\$', which finds only paths .* earlier",
    ),
    ({"bias": 1}, ValueError, r"finds 'bias', which is no kernel.*\(3,\)"),
    ({"a": 0}, ValueError, "must be a rank >= 1"),
    ({"a": True}, ValueError, "must be a rank >= 1"),
    ({"a": 4}, ValueError, "wants rank 4.*5 inputs and 3 outputs"),
    ({"a": (1, "iio")}, ValueError, "one letter for each axis"),
    ({"a": (1, "xy")}, ValueError, "one letter for each axis"),
    ({"a": (1, 3)}, ValueError, "one letter for each axis"),
    ({"*a": 1}, ValueError, r"'\*a' is not a regular expression: nothing to repeat"),
    ({3: 1}, TypeError, "a key of rules must be a regular expression"),
    ({"heads": 2}, ValueError, r'a stack of 16 layers .*\(2, "lio"\).* needs \(2, "ioo"\)'),
    ({"deep": 1}, ValueError, r"shape \(2, 2, 2, 2, 2\)"),
    ({}, TypeError, "rules must be a dict"),
    (3, TypeError, "rules must be a dict"),
  ],
)
def test_wrong_rules(rules, error, message):
  params = {"a": jnp.ones([5, 3]), "bias": jnp.ones([3]), "deep": jnp.ones([2] * 5)}
  params["heads"] = jnp.ones([16, 4, 4])
  with pytest.raises(error, match=message):
    lora.init(KEY, params, rules)


def test_kernels_of_attention_are_not_taken_for_stacks_of_layers():
  from flax import linen as nn

  attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=32)
  params = attention.init(KEY, jnp.ones([1, 3, 8]))["params"]
  assert params["out"]["kernel"].shape == (2, 16, 8)  # by its shape alone: 2 layers, 16 inputs
  for name, axes in (("query", "ioo"), ("out", "iio")):
    rule = f"{name}/kernel"
    with pytest.raises(ValueError, match=r'"lio".*\[heads, size, out\] \(1, "iio"\)'):
      lora.init(KEY, params, {rule: 1})
    drawn = lora.init(KEY, params, {rule: (1, axes)})
    assert sum(x.ndim for x in jax.tree.leaves(drawn)) == 3 + 2
  stack = {"kernel": jnp.ones([2, 16, 8]), "bias": jnp.ones([2, 8]), "scale": jnp.ones([])}
  assert lora.init(KEY, stack, {"kernel": 1})["kernel"]["B"].shape == (2, 1, 8)
  haiku = {"linear": {"w": jnp.ones([2, 16, 8]), "b": jnp.ones([2, 8])}}
  assert lora.init(KEY, haiku, {"w$": 1})["linear"]["w"]["B"].shape == (2, 1, 8)


def test_wrong_adapters():
  x, adapters = jnp.ones([2, 3]), lora.init(KEY, W, {"w": 1})
  attached = lora.attach(lambda p, x: x @ p["w"])
  with pytest.raises(ValueError, match="'other', which constants lack"):
    attached({"other": adapters["w"]}, x, W)
  with pytest.raises(ValueError, match="'other', which params lack"):
    lora.merge(W, {"other": adapters["w"]})
  with pytest.raises(ValueError, match=r"w/A \(4, 1\) and w/B \(1, 3\) do not fit the kernel"):
    attached({"w": {"A": jnp.ones([4, 1]), "B": jnp.ones([1, 3])}}, x, W)
  with pytest.raises(ValueError, match="they share no rank"):
    attached({"w": {"A": jnp.ones([3, 1]), "B": jnp.ones([2, 4])}}, x, W)
  with pytest.raises(ValueError, match="for the adapters of T tasks use jax.vmap"):
    attached(jax.tree.map(lambda a: jnp.stack([a] * 4), adapters), x, W)
  with pytest.raises(TypeError, match="adapters must be a dict nested by path.*got ArrayImpl"):
    attached(jnp.ones([3]), x, W)
  with pytest.raises(TypeError, match="constants/act is no array.*eqx.partition"):
    attached(adapters, x, {**W, "act": jnp.tanh})
  with pytest.raises(ValueError, match='"A" is the module of every A'):
    lora.labels({"A": adapters["w"]}, train_A=False)
  with pytest.raises(TypeError, match="alpha must be a number"):
    lora.merge(W, adapters, alpha="1")
  with pytest.raises(TypeError, match="predict must be a function"):
    lora.attach(W)


@pytest.mark.parametrize(
  ("shape", "axes", "rank"),
  [((4, 4), "oi", 4), ((2, 4, 4), "loi", 4), ((3, 4, 3, 3), "oiii", 3), ((2, 8, 8, 2), "ooii", 4)],
)
def test_factors_that_fit_two_layouts(shape, axes, rank):
  with pytest.raises(ValueError, match=rf"axes '{axes}'.* also fit the axes"):
    lora.init(KEY, {"w": jnp.ones(shape)}, {"w": (rank, axes)})
  lora.init(KEY, {"w": jnp.ones(shape)}, {"w": (np.int64(1), axes)})
