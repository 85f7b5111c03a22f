#!/usr/bin/env bash
# A reasonable guess: an argument that a jitted function returns untouched is the same array after
# the call, as it is without jit. So a state may carry a large base network along for nothing.
#
# What happens: the result has memory of its own. Every call copies the array, and XLA's memory
# analysis counts it among the outputs. With donate_argnums the result reuses the memory.
#
# Versions: jax and jaxlib 0.10.2, CPU backend.
#
# Why it matters in meta-learning with JAX: a training state with a frozen base takes twice the
# memory of the base during an update, and a copy of it in time, without a word.
#
# What to do: donate the state, or keep the base out of what the function returns. shrinkmeta's fit
# passes constants beside the state; in a loop of your own use jax.jit(update, donate_argnums=0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp


def update(state):
  return {"base": state["base"], "w": state["w"] + jnp.sum(state["base"])}


def make():
  return {"base": jnp.ones((256, 1024)), "w": jnp.zeros(())}


where = lambda x: x.unsafe_buffer_pointer()
found = {}
for name, f in (
  ("plain", update),
  ("jit", jax.jit(update)),
  ("jit, donated", jax.jit(update, donate_argnums=0)),
):
  state = make()
  before = where(state["base"])
  found[name] = before == where(f(state)["base"])
  print(f"{name:12}: the base is where it was: {found[name]}")
memory = jax.jit(update).lower(make()).compile().memory_analysis()
print(f"outputs of {memory.output_size_in_bytes} bytes, the base has {256 * 1024 * 4}")
assert found == {"plain": True, "jit": False, "jit, donated": True}, "changed"
assert memory.output_size_in_bytes >= 256 * 1024 * 4, "changed: the base is no output"
END
