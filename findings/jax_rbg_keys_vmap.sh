#!/usr/bin/env bash
# A reasonable guess: under vmap, task i draws with key i.
#
# What happens: with keys of the implementation "rbg", all lanes of a vmap draw from the first key
# alone. Other keys in the remaining places change nothing, and task 1 draws other numbers by
# itself than in a batch.
#
# Versions: jax 0.10.2. The documentation of jax.random says so; the default, threefry2x32, does
# not do it.
#
# Why it matters in meta-learning with JAX: "rbg" is a common choice on TPUs because it is fast.
# Episode i of a seed then depends on which tasks share its meta-batch, so a run on one device and
# on several devices sees different episodes.
#
# What to do: keep jax_default_prng_impl at threefry2x32 for keys that draw tasks, or draw in
# lax.map. shrinkmeta draws the tasks and the mini-batches of a meta-batch under vmap; that a task
# depends on its own key alone holds for threefry2x32 keys only.
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
import numpy as np

draw = lambda key: jax.random.normal(key, (3,))
for impl in ("threefry2x32", "rbg"):
  keys = jax.random.split(jax.random.key(0, impl=impl), 4)
  others = jax.random.split(jax.random.key(1, impl=impl), 4)
  mixed = jnp.concatenate([keys[:1], others[1:]])  # only the first key stays
  batch = np.asarray(jax.vmap(draw)(keys))
  alone = np.stack([draw(key) for key in keys])
  other = np.asarray(jax.vmap(draw)(mixed))
  print(impl)
  print("  task 1 in a batch                  ", batch[1])
  print("  task 1 by itself                   ", alone[1])
  print("  task 1 in a batch, with another key", other[1])
  as_alone, ignored = np.array_equal(batch, alone), np.array_equal(batch, other)
  expected = (False, True) if impl == "rbg" else (True, False)
  assert (as_alone, ignored) == expected, f"changed: {impl} {as_alone} {ignored}"
END
