"""Networks of several libraries with rules for their kernels, for the tests of adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shrinkmeta.adapters import lora

KEY = jax.random.key(0)


def random_like(tree, seed=1, scale=0.3):
  """A tree of normal numbers with the shapes and dtypes of `tree`."""
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(scale * random.normal(size=x.shape), x.dtype), tree)


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="head")(nn.tanh(nn.Dense(7, name="body")(x)))


class ConvNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Conv(6, (3, 3), strides=2, name="conv_0")(x))
    x = nn.tanh(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
    x = nn.tanh(nn.ConvTranspose(4, (2, 2), name="up")(x))
    x = nn.tanh(nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name="turned")(x))
    return nn.Dense(2, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    return nn.Conv(3, (3,), name="conv")(x)


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Layer)
    scanned = nn.scan(layer, {"params": 0}, split_rngs={"params": True}, length=3)
    return scanned(name="layers")(x, None)[0]


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.tanh(nn.Dense(5, name="dense")(x)), None


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(5, 7, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(7, 7, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    x = jnp.tanh(self.body(x))
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(x)


@nnx.split_rngs(splits=3)
@nnx.vmap
def nnx_layers(rngs):
  return nnx.Linear(5, 5, rngs=rngs)


def linen(net, x, rules):
  params = random_like(jax.eval_shape(net.init, KEY, x), seed=2)
  return lambda params, x: net.apply(params, x), params, x, rules


def by_nnx(dtype):
  graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  predict = lambda params, x: nnx.merge(graph, params, copy=True)(x)
  return predict, params, jnp.ones([4, 5], dtype), {"body/kernel": 2, r"layers/\d/kernel": 3}


def nnx_scan(dtype):
  graph, params = nnx.split(nnx_layers(nnx.Rngs(0)), nnx.Param)
  params = jax.tree.map(lambda x: x.astype(dtype), params)

  def predict(params, x):
    step = nnx.scan(
      lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return step(x, nnx.merge(graph, params, copy=True))

  return predict, params, jnp.ones([4, 5], dtype), {"kernel": 2}


def plain(dtype):
  """A kernel moves and multiplies in every way that is followed."""

  @jax.custom_jvp
  def custom(x, w):
    return x @ w

  custom.defjvp(lambda p, t: (custom(*p), t[0] @ p[1] + p[0] @ t[1]))
  other = jax.custom_vjp(lambda x, w: x @ w)
  other.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, c: (c @ r[1].T, r[0].T @ c))

  def predict(params, x):
    w, layers = params["w"], jnp.copy(params["layers"])  # [6, 6], [3, 6, 6]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    w = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(w), device)
    positive, index = x.sum() > 0, jnp.argmax(x[0]) % 3
    x = jnp.tanh(custom(x, w) + other(x, w.T))
    x = jnp.tanh(jnp.einsum("oi,ni->no", w, x) + x @ w[::-1, :])
    x = jnp.tanh(jax.checkpoint(lambda x: x @ w.reshape(2, 3, 1, 6).reshape(6, 6))(x))
    x = jnp.tanh(jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(jnp.tanh(x), w), None), x, layers)[0])
    x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]
    x = x + jnp.einsum("lnd,lde->ne", jnp.stack([x] * 3), layers) @ layers[1]
    x = jax.lax.cond(positive, lambda x, w: x @ w, lambda x, w: x @ w.T, x, w)
    q, k = jnp.split(w, 2, 1)
    x = jnp.tanh(jnp.concatenate([x @ q, jnp.dot(x, k[None])[:, 0]], -1))
    return jnp.tanh(x @ layers[index]) @ w[:, :2]

  params = {"w": jnp.zeros([6, 6], dtype), "layers": jnp.zeros([3, 6, 6], dtype)}
  return (
    predict,
    random_like(params, 3),
    random_like(jnp.ones([4, 6], dtype)),
    {"w": 2, "layers": 1},
  )


def networks(dtype):
  images = random_like(jnp.ones([2, 6, 6, 4], dtype), seed=5, scale=1.0)
  vectors = random_like(jnp.ones([4, 5], dtype), seed=6, scale=1.0)
  words = random_like(jnp.ones([2, 5, 4], dtype), seed=7, scale=1.0)
  heads = {"(query|key|value)/kernel": (2, "ioo"), "(out|conv)/kernel": (2, "iio")}
  return {
    "dense": lambda: linen(Dense(), vectors, {"kernel": 2}),
    "conv": lambda: linen(ConvNet(), images, {"kernel": 2}),
    "attention": lambda: linen(Attention(), words, heads),
    "linen scan": lambda: linen(Stacked(), vectors, {"kernel": 2}),
    "nnx": lambda: by_nnx(dtype),
    "nnx scan": lambda: nnx_scan(dtype),
    "plain": lambda: plain(dtype),
  }


NAMES = tuple(networks(jnp.float32))


def problem(name, dtype=jnp.float32):
  """(predict, params, inputs, adapters with B away from 0)."""
  predict, params, x, rules = networks(dtype)[name]()
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  adapters = jax.eval_shape(lambda params: lora.init(KEY, params, rules), params)
  return predict, params, x, random_like(adapters, seed=4)


def close(got, want, dtype):
  tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    scale = max(1.0, float(np.abs(b).max()))
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)
