#!/usr/bin/env bash
# A reasonable guess: flax.serialization.from_bytes(target, data) refuses data whose arrays have
# other shapes than those of the target.
#
# What happens: it checks only that every name of the target is in the file. Arrays come back with
# the shape and dtype of the file, and leaves that the target lacks are dropped, all without a
# warning. A name that the file lacks does raise.
#
# Versions: flax 0.12.8 with jax 0.10.2. The docstring of from_state_dict, which does the work,
# says that the target's shapes and dtypes are used.
#
# Why it matters in meta-learning with JAX: phi of a network with 5 classes loads into a learner
# for 20 classes. Broadcasting hides it further: a bias of shape [1] works with any number of
# outputs. A float32 file turns a bfloat16 model into a float32 one, with its memory.
#
# What to do: compare jax.tree.map(jnp.shape, ...) of both trees after loading. shrinkmeta's
# checkpoints store a description of the state and raise ValueError where shape or dtype differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
from flax import serialization

shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
saved = {"head": {"kernel": jnp.ones((64, 5)), "bias": jnp.ones(1)}}
half = jnp.bfloat16
target = {"head": {"kernel": jnp.zeros((64, 20), half), "bias": jnp.zeros(20, half)}}
data = serialization.to_bytes(saved)
loaded = serialization.from_bytes(target, data)
print("target", shapes(target))
print("loaded", shapes(loaded))
assert shapes(loaded) == shapes(saved), "changed: shapes"
fewer = serialization.from_bytes({"head": {"kernel": jnp.zeros((64, 5))}}, data)
print("fewer ", shapes(fewer))
assert list(fewer["head"]) == ["kernel"], "changed: leaves that the target lacks"
try:
  serialization.from_bytes({"head": {"weight": jnp.zeros((64, 5))}}, data)
except ValueError as error:
  print("another name raises:", str(error)[:70])
else:
  raise AssertionError("changed: names are not checked")
END
