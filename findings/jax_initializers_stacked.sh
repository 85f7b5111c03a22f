#!/usr/bin/env bash
# A reasonable guess: lecun_normal draws kernels of shape (tasks, in, out) with variance 1 / in, as
# `x @ kernel` takes the last two axes. orthogonal makes each of them orthogonal.
#
# What happens: all axes but the last count as inputs. The variance is 1 / (tasks * in), so with 256
# tasks the weights are 16 times too small. orthogonal makes the columns of the whole stack
# orthonormal, and a task's matrix is neither orthogonal nor of norm 1. flax hands the whole
# shape to the initializer: the outputs of nnx.Einsum and linen.Einsum for "btd,tdh->bth", and of
# linen.DenseGeneral with batch_dims=(0,), shrink with the number of tasks. A vmap over keys does not.
#
# Versions: jax and jaxlib 0.10.2, flax 0.12.8, CPU backend.
#
# Output seen, the standard deviation of the outputs for inputs of standard deviation 1:
#   tasks   nnx.Einsum   linen.Einsum   DenseGeneral
#       1         1.07           1.09           1.09
#     256        0.063          0.063          0.063
#
# Why it matters in meta-learning with JAX: heads, adapters and networks of many tasks are kept as one
# array with a leading axis. Results then depend on how many tasks are stacked, the gradients that
# reach the shared layers are 16 times too small, and a prior width taken from the initial
# weights is too.
#
# What to do: lecun_normal(batch_axis=0), also as the kernel_init of Einsum; orthogonal has no such
# argument: use jax.vmap over keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.nn.initializers import lecun_normal, orthogonal

print("jax", jax.__version__, "flax", flax.__version__)
key, width, spread = jax.random.key(0), 32, {}
print("tasks  nnx.Einsum  linen.Einsum  batch_axis=0  DenseGeneral")
for tasks in (1, 16, 256):
  x = jax.random.normal(jax.random.key(1), (8, tasks, width))
  shape, rule = (tasks, width, width), "btd,tdh->bth"
  stacked = lecun_normal(batch_axis=0)
  general = linen.DenseGeneral(width, batch_dims=(0,))
  outputs = {
    "nnx": nnx.Einsum(rule, shape, rngs=nnx.Rngs(0))(x),
    "linen": linen.Einsum(shape, rule).init_with_output(key, x)[0],
    "remedy": nnx.Einsum(rule, shape, kernel_init=stacked, rngs=nnx.Rngs(0))(x),
    "general": general.init_with_output(key, jnp.moveaxis(x, 1, 0))[0],
  }
  spread[tasks] = {name: float(y.std()) for name, y in outputs.items()}
  print(f"{tasks:5}" + "".join(f"{value:13.4f}" for value in spread[tasks].values()))

kernels = orthogonal()(key, (4, 8, 8))
one_by_one = jax.vmap(lambda k: orthogonal()(k, (8, 8)))(jax.random.split(key, 4))
gram = lambda w: np.asarray(jnp.einsum("tio,tip->top", w, w))
print("orthogonal, a stack of 4: squared column norms of task 0:", gram(kernels)[0].diagonal())
print("orthogonal, vmap over keys:", gram(one_by_one)[0].diagonal())

for tasks, found in spread.items():
  for name in ("nnx", "linen", "general"):
    assert abs(found[name] * tasks**0.5 - 1.0) < 0.2, f"changed: {name}, {tasks} tasks"
  assert abs(found["remedy"] - 1.0) < 0.2, f"changed: batch_axis=0, {tasks} tasks"
assert np.allclose(gram(kernels).sum(0), np.eye(8), atol=1e-4), "changed: the stack"
assert gram(kernels)[0].diagonal().max() < 0.9, "changed: a task's matrix"
assert np.allclose(gram(one_by_one), np.eye(8), atol=1e-4), "changed: vmap"
END
