#!/usr/bin/env bash
# A reasonable guess: jax.random.fold_in and jax.random.split derive keys in two ways, so that
# fold_in(key, step) is none of the keys of split(key, n).
#
# What happens: fold_in(key, i) is split(key, n)[i], whatever n is. In
#   init_key, data_key = split(key);  step_key = fold_in(key, step)
# step 0 draws with init_key and step 1 with data_key, and the key of a task from split(key, tasks)
# is the key of a step. The same holds for "rbg" keys, not for "unsafe_rbg", and not with
# jax_threefry_partitionable=False, the default of earlier versions. flax.nnx.Rngs(key) folds in a
# counter: its first key is split(key)[0]. Below, the inputs are drawn with that key, and have a
# correlation of 0.997 with the weights of the first layer.
#
# Versions: jax and jaxlib 0.10.2, flax 0.12.8, CPU backend. A public pull request of 2022 made the
# two equal on purpose.
#
# Why it matters in meta-learning with JAX: split makes the keys of tasks, and fold_in those of steps
# and epochs, often from one key. The noise of an update is then the noise that drew a task, and
# random projections and probes depend on the data. Everything looks random, and no test fails.
#
# What to do: split once, and fold steps into a key of that split which nothing else uses:
#   init_key, data_key, train_key = split(key, 3);  step_key = fold_in(train_key, step)
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
import numpy as np
from flax import nnx

print("jax", jax.__version__, "flax", flax.__version__)
words = lambda key: np.asarray(jax.random.key_data(key)).tolist()


def same(impl):
  key = jax.random.key(0, impl=impl)
  return [
    words(jax.random.fold_in(key, i)) == words(jax.random.split(key, n)[i])
    for n in (2, 10, 1000)
    for i in (0, 1, n - 1)
  ]


found = {impl: same(impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")}
with jax.threefry_partitionable(False):
  found["threefry2x32, not partitionable"] = same("threefry2x32")
for name, equal in found.items():
  print(f"{name}: fold_in(key, i) is split(key, n)[i] in {sum(equal)} of {len(equal)} cases")

key = jax.random.key(0)
init_key, data_key = jax.random.split(key)
noise = jax.random.normal(jax.random.fold_in(key, 1), (5,))  # of step 1
data = jax.random.normal(data_key, (5,))
print("noise of step 1:", noise, "data:", data)

x = jax.random.normal(init_key, (4, 64))  # here the key of the inputs
layer = nnx.Linear(4, 64, rngs=nnx.Rngs(key))
correlation = float(np.corrcoef(x.ravel(), layer.kernel[...].ravel())[0, 1])
print(f"correlation of the inputs with the first weights: {correlation:.4f}")

assert all(found["threefry2x32"]) and all(found["rbg"]), "changed: the keys differ"
assert not any(found["unsafe_rbg"]), "changed: unsafe_rbg"
assert not any(found["threefry2x32, not partitionable"]), "changed: not partitionable"
assert (noise == data).all(), "changed: the noise"
assert correlation > 0.98, "changed: flax"
END
