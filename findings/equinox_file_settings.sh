#!/usr/bin/env bash
# A reasonable guess: equinox.tree_deserialise_leaves(file, like) reads arrays. Settings such as the
# rate of Dropout come from `like`, and a file of another model is refused.
#
# What happens: numbers and flags are leaves too. A file that was saved in inference mode switches the
# dropout of the new model off, and the rate 0.5 of the new configuration becomes the 0.1 of the
# file. The file has no names: arrays are read in order. A file with more layers than the model fills
# the first ones and the rest is not read, and a class whose two fields of one shape were
# reordered gets each one's values in the other. Only another shape or dtype is an error.
#
# Versions: equinox 0.13.8, jax and jaxlib 0.10.2, CPU backend. The documentation says that Python
# scalars are saved, and that `like` may be a part of the saved structure.
#
# Why it matters in meta-learning with JAX: a base model is saved after its evaluation and loaded again
# to be adapted with another dropout. It adapts without any dropout, and the configuration in the log
# says otherwise. Models of equal widths, the usual ones, load into one another.
#
# What to do: save and load eqx.filter(model, eqx.is_array), and combine it with the rest of the new
# model; write the number of leaves and their paths beside it, and check that the file is at its end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W error - <<'END'
import equinox as eqx
import jax
import jax.numpy as jnp

print("equinox", eqx.__version__, "jax", jax.__version__)


class Layer(eqx.Module):
  weight: jax.Array
  dropout: eqx.nn.Dropout


class Network(eqx.Module):
  layers: list

  def __init__(self, depth, value, p):
    self.layers = [
      Layer(jnp.full((2, 2), value + i, jnp.float32), eqx.nn.Dropout(p)) for i in range(depth)
    ]


class Scaled(eqx.Module):
  scale: jax.Array
  shift: jax.Array


class Reordered(eqx.Module):
  shift: jax.Array
  scale: jax.Array


one, zero = jnp.ones(2, jnp.float32), jnp.zeros(2, jnp.float32)
trained = eqx.nn.inference_mode(Network(depth=2, value=7.0, p=0.1))
fresh = Network(depth=2, value=0.0, p=0.5)
eqx.tree_serialise_leaves("model.eqx", trained)
loaded = eqx.tree_deserialise_leaves("model.eqx", fresh)
drop = loaded.layers[0].dropout
print(f"new model: p=0.5, inference=False; after loading: p={drop.p}, inference={drop.inference}")

with open("arrays.eqx", "wb") as file:
  eqx.tree_serialise_leaves(file, eqx.filter(trained, eqx.is_array))
wanted, kept = eqx.partition(fresh, eqx.is_array)
remedy = eqx.combine(eqx.tree_deserialise_leaves("arrays.eqx", wanted), kept)
print("arrays only:", remedy.layers[0].dropout, "weight", remedy.layers[0].weight[0, 0])

eqx.tree_serialise_leaves("deep.eqx", Network(depth=4, value=7.0, p=0.1))
with open("deep.eqx", "rb") as file:
  shallow = eqx.tree_deserialise_leaves(file, fresh)
  unread = len(file.read())
weights = [float(layer.weight[0, 0]) for layer in shallow.layers]
print(f"a file of 4 layers in a model of 2: weights {weights}, {unread} bytes not read")

eqx.tree_serialise_leaves("scaled.eqx", Scaled(scale=one, shift=zero))
other = eqx.tree_deserialise_leaves("scaled.eqx", Reordered(shift=zero, scale=one))
print("scale 1 and shift 0, read by a class with the fields reordered:", other.scale, other.shift)

try:
  eqx.tree_deserialise_leaves("scaled.eqx", Scaled(scale=jnp.ones(3, jnp.float32), shift=zero))
  refused = "nothing"
except Exception as error:
  refused = type(error).__name__
print("another shape:", refused)

assert drop.p == 0.1 and drop.inference is True, "changed: the settings"
dropout = remedy.layers[0].dropout
assert (dropout.p, dropout.inference) == (0.5, False) and remedy.layers[0].weight[0, 0] == 7.0
assert weights == [7.0, 8.0] and unread > 0, "changed: a longer file"
assert (other.scale == zero).all() and (other.shift == one).all(), "changed: the order"
assert refused == "RuntimeError", "changed: another shape"
END
