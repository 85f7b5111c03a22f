#!/usr/bin/env bash
# A reasonable guess: the label -1, a common mark of padding, is ignored everywhere, or is an error
# everywhere.
#
# What happens: it has four meanings. optax's softmax_cross_entropy_with_integer_labels takes it as
# the last class, and its gradient trains that class. jax.nn.one_hot makes it a row of zeros, so
# that the loss of optax.softmax_cross_entropy is 0. jnp.bincount counts it as class 0.
# jax.ops.segment_sum drops it. Another mark, -100, makes the first loss NaN with a finite
# gradient.
#
# Versions: optax 0.2.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: tasks of different sizes are padded. Loss, confusion
# counts and sums per class of one program then disagree on what padding is, and the last class of
# each task is trained on padding.
#
# What to do: carry a mask beside the labels. shrinkmeta's Batch has one, and its categorical
# likelihood refuses labels out of range: ValueError outside jit, NaN for loss and gradient under
# jit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
import numpy as np
import optax

logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
integer = lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()
found = {}
for label in (-1, -100):
  y = jnp.array([label])
  found[label] = {
    "integer labels: loss": float(integer(logits, y)),
    "integer labels: gradient": np.asarray(jax.grad(integer)(logits, y)[0]).round(3).tolist(),
    "one_hot: loss": float(optax.softmax_cross_entropy(logits, jax.nn.one_hot(y, 3))[0]),
    "bincount": np.asarray(jnp.bincount(y, length=3)).tolist(),
    "segment_sum": np.asarray(jax.ops.segment_sum(jnp.ones(1), y, 3)).tolist(),
  }
  for name, value in found[label].items():
    print(f"label {label:4}, {name:25} {value}")
one = found[-1]
assert abs(one["integer labels: loss"] + np.log(0.7)) < 1e-5, "changed: the last class"
gradient = one["integer labels: gradient"]
assert np.allclose(gradient, [0.1, 0.2, -0.3], atol=2e-3), "changed: gradient"
assert one["one_hot: loss"] == 0 and one["bincount"] == [1, 0, 0], "changed: one_hot or bincount"
assert one["segment_sum"] == [0, 0, 0], "changed: segment_sum"
far = found[-100]
assert np.isnan(far["integer labels: loss"]), "changed: -100"
assert np.isfinite(far["integer labels: gradient"]).all(), "changed: gradient of -100"
END
