#!/usr/bin/env bash
# A reasonable guess: a group norm is a norm of each example, so GroupNorm of Flax treats an array
# [tasks, batch, height, width, channels] as Conv and LayerNorm treat it: one image after another.
# And one image without a batch axis gives what a batch of one gives.
#
# What happens: GroupNorm and InstanceNorm take the first axis, and only the first, for the batch,
# and average over all others. With an axis of tasks in front, the images of a task are normalised
# together: the output for one image changes with the other images. With vectors
# [tasks, batch, channels] it is the same. For one image without a batch axis, as under a vmap over
# examples, each row of pixels is normalised on its own. No shape and no warning tells.
#
# Versions: flax 0.12.8 with jax 0.10.2, linen; nnx has the same rule. The class promises that its
# result does not depend on the composition of the batch. The default axes are in the code, as
# range(1, ndim - 1) and -1; the argument's text leaves it to the reader that more axes in front
# need it.
#
# Why it matters in meta-learning with JAX: an axis of tasks in front of the batch, or a vmap over
# single examples, is the normal case. Then the prediction for a query example depends on the other
# queries. The accuracy on 20 queries at once is not that of one at a time, and a model that serves
# single requests is not the one that was evaluated.
#
# What to do: GroupNorm(reduction_axes=(-3, -2, -1)) for images, (-1,) for vectors, or a vmap over
# tasks, so that the network sees [batch, height, width, channels]. shrinkmeta does the latter, and
# sm.predict_tasks shows an example to the network as a batch of one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import flax
import jax
import numpy as np
from flax import linen as nn

print("flax", flax.__version__, "jax", jax.__version__)
random = np.random.default_rng(0)
images = random.normal(size=(2, 3, 4, 4, 8)).astype(np.float32)  # [tasks, batch, H, W, channels]
images *= np.float32([1, 2, 5])[:, None, None, None]  # the images of a task differ in contrast
kernel = random.normal(size=(3, 3, 8, 8)).astype(np.float32)
norm = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
layers = {
  "Conv": (nn.Conv(8, (3, 3), use_bias=False), {"kernel": kernel}),
  "LayerNorm": (nn.LayerNorm(), norm),
  "GroupNorm": (nn.GroupNorm(num_groups=2), norm),
  "InstanceNorm": (nn.InstanceNorm(), norm),
  "GroupNorm, axes given": (nn.GroupNorm(num_groups=2, reduction_axes=(-3, -2, -1)), norm),
}
other = images.copy()
other[:, 1:] *= 10  # the first image of each task stays
found = {}
for name, (layer, parameters) in layers.items():
  f = lambda x: np.asarray(layer.apply({"params": parameters}, x))
  batch = f(images[0])  # [batch, H, W, channels]: each example on its own, in all layers
  found[name] = [
    np.abs(f(images)[0] - batch).max(),
    np.abs(f(images)[:, 0] - f(other)[:, 0]).max(),
    np.abs(f(images[0, 0]) - batch[0]).max(),
  ]
  with_tasks, of_others, alone = found[name]
  print(
    f"{name:21} with an axis of tasks {with_tasks:6.3f}, other images times ten {of_others:6.3f}, "
    f"one image without a batch {alone:6.3f}"
  )
vectors, layer = images[:, :, 0, 0], nn.GroupNorm(num_groups=2)
f = lambda x: np.asarray(layer.apply({"params": norm}, x))
print(f"vectors [tasks, batch, channels] {np.abs(f(vectors)[0] - f(vectors[0])).max():.3f}")
for name in ("Conv", "LayerNorm", "GroupNorm, axes given"):
  assert max(found[name]) < 1e-4, f"changed: {name}"
for name in ("GroupNorm", "InstanceNorm"):
  assert min(found[name]) > 0.1, f"changed: {name}"
assert np.abs(f(vectors)[0] - f(vectors[0])).max() > 0.1, "changed: vectors"
END
