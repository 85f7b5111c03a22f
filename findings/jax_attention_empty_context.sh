#!/usr/bin/env bash
# A reasonable guess: attention with a mask never reads what is masked. A task without any context
# example, whose mask is False everywhere, gets zeros, or NaN.
#
# What happens: it gets the plain mean over the padding, masked as it is. The prediction without
# data depends on what the padding holds and on how long it is, and gradients flow into the
# padding. The reason is that masked scores become the lowest finite number: if all of them do, they
# are equal, and softmax weighs them equally. One real example is enough to shut the padding out.
# jax.nn.dot_product_attention, also with key_value_seq_lengths=0, and the attention layers of
# flax.linen, flax.nnx, equinox and haiku do this. PyTorch 2.9.1 returns 0 or NaN.
#
# Versions: jax 0.10.2, flax 0.12.8, equinox 0.13.8, dm-haiku 0.0.17. The documentation of
# jax.nn.dot_product_attention says that a position takes part where the mask is True.
#
# Why it matters in meta-learning with JAX: attentive neural processes and in-context learners are
# trained and judged with 0, 1, 2, ... context examples, and tasks are padded to one length. The
# curve begins at 0 shots. There the padding answers: zeros, or, in a buffer that is filled again,
# the examples of the task before. The same task has two predictions in two meta-batches.
#
# What to do: add one learned key that all queries may see, or replace the result by
# jnp.where(mask.any(-1, keepdims=True), result, 0). jax.nn.softmax(scores, where=mask) gives 0.
# shrinkmeta masks losses, and cannot see the attention in your network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flax==0.12.8 equinox==0.13.8 dm-haiku==0.0.17
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import equinox
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

print("jax", jax.__version__, "flax", flax.__version__, "equinox", equinox.__version__, end=" ")
print("haiku", hk.__version__)
key = jax.random.key(0)
size, length, width = 1, 6, 4  # queries, padded context, features
query, real = jax.random.normal(key, (2, length, width))
query = query[:size]


def mask_of(count):
  return jnp.broadcast_to(jnp.arange(length) < count, (size, length))


def plain(c, count):
  x = c[None, :, None]
  return jax.nn.dot_product_attention(query[None, :, None], x, x, mask=mask_of(count)[None, None])


def by_length(c, count):
  x, n = c[None, :, None], jnp.array([count])
  return jax.nn.dot_product_attention(query[None, :, None], x, x, key_value_seq_lengths=n)


linen = nn.MultiHeadDotProductAttention(2)
weights = linen.init(key, query, real)
layer = nnx.MultiHeadAttention(2, width, decode=False, rngs=nnx.Rngs(0))
eqx = equinox.nn.MultiheadAttention(2, width, key=key)
initial = hk.initializers.RandomNormal()


@hk.without_apply_rng
@hk.transform
def haiku(c, mask):
  return hk.MultiHeadAttention(2, 2, w_init=initial)(query, c, c, mask=mask[None])


haiku_weights = haiku.init(key, real, mask_of(1))


def remedy_where(c, count):
  return jnp.where(mask_of(count).any(-1, keepdims=True), plain(c, count)[0, :, 0], 0)


def remedy_softmax(c, count):
  return jax.nn.softmax(query @ c.T / 2, where=mask_of(count)) @ c


ways = {
  "jax.nn, mask": plain,
  "jax.nn, length": by_length,
  "flax.linen": lambda c, count: linen.apply(weights, query, c, mask=mask_of(count)[None]),
  "flax.nnx": lambda c, count: layer(query, c, c, mask=mask_of(count)[None]),
  "equinox": lambda c, count: eqx(query, c, c, mask=mask_of(count)),
  "haiku": lambda c, count: haiku.apply(haiku_weights, c, mask_of(count)),
  "remedy: where": remedy_where,
  "remedy: softmax": remedy_softmax,
}
other = 100 * jax.random.normal(jax.random.key(1), (length, width))
print("largest change of the output if the padding changes, and gradient in the padding")
for name, attend in ways.items():
  change, slope = {}, {}
  for count in (0, 1, 3):
    hidden = jnp.arange(length)[:, None] >= count
    before, after = (attend(jnp.where(hidden, pad, real), count) for pad in (0.0, other))
    assert jnp.isfinite(before).all() and jnp.isfinite(after).all(), f"changed: {name}, NaN"
    change[count] = float(abs(after - before).max())
    gradient = jax.grad(lambda c: attend(c, count).sum())(jnp.where(hidden, other, real))
    slope[count] = float(abs(jnp.where(hidden, gradient, 0)).max())
  rows = (f"{n} examples {change[n]:8.3g}, {slope[n]:.2g}" for n in change)
  print(f"  {name:16}", *rows, sep="   ")
  assert change[1] == change[3] == slope[1] == slope[3] == 0, f"changed: {name}, with examples"
  if "remedy" in name:
    assert change[0] == slope[0] == 0, f"changed: {name}"
  else:
    assert change[0] > 1 and slope[0] > 0.01, f"changed: {name}, without examples"

mean = np.asarray(other.mean(0))
output = np.asarray(plain(other, 0)).ravel()
print("mean of the padding:      ", mean.round(3))
print("jax.nn without an example:", output.round(3))
assert np.allclose(output, mean, rtol=1e-4), "changed: not the mean"
END
