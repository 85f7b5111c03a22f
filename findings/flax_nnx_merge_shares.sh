#!/usr/bin/env bash
# A reasonable guess: nnx.split and nnx.merge are the functional door of NNX: every merge of one
# (graphdef, state) pair builds a model of its own.
#
# What happens: outside jit all merged models share the same Variables. Running the first model
# updates the batch statistics of the second, of the state they came from and of every model merged
# later. nnx.merge(..., copy=True) does not share.
#
# Versions: flax 0.12.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: a loop over test tasks that merges a fresh model for
# each task hands the statistics of task 1 to task 2, so results depend on the order of tasks.
# Under jit, where the state is an argument, nothing leaks from one call to the next, so the two
# disagree.
#
# What to do: pass copy=True in loops that are not jitted. shrinkmeta takes networks as pure
# functions of a pytree of parameters and keeps no statistics.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax.numpy as jnp
import numpy as np
from flax import nnx


def pair():
  return nnx.split(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))


task = jnp.array([[1.0, 10.0], [3.0, 30.0]])
found = {}
for copy in (False, True):
  graphdef, state = pair()
  first = nnx.merge(graphdef, state, copy=copy)
  second = nnx.merge(graphdef, state, copy=copy)
  first(task)  # only the first model sees data
  later = nnx.merge(graphdef, state, copy=copy)
  found[copy] = [np.asarray(m.mean.get_value()) for m in (first, second, later)]
  print(f"copy={copy!s:5}: running means of the first, the second, a later model: {found[copy]}")
assert np.any(found[False][0] != 0), "changed: the first model has no statistics"
assert all(np.array_equal(found[False][0], m) for m in found[False][1:]), "changed: not shared"
assert all(np.all(m == 0) for m in found[True][1:]), "changed: copy=True shares"
END
