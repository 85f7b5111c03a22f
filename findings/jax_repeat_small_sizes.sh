#!/usr/bin/env bash
# A reasonable guess: jnp.repeat(tasks, sizes) is np.repeat whatever the dtype of the sizes, and
# jnp.cumsum widens small integers, as jnp.sum and NumPy's cumsum do.
#
# What happens: with sizes of type uint8 and more than 255 rows, jnp.repeat has the right length and
# wrong entries, from the first tasks on. It is built on jnp.cumsum, which keeps uint8 and wraps,
# while jnp.sum widens: the sum of 300 ones is 300, the last entry of their cumsum is 44. An int8
# becomes negative after 127. jnp.nancumsum, jnp.add.accumulate and x.cumsum() wrap too.
# jnp.cumulative_sum, which has the same purpose, widens, and so does cumsum of booleans.
# jnp.bincount(ids, weights=x) keeps uint8 as well, where NumPy returns float64. Nothing warns,
# inside or outside jit.
#
# Versions: jax and jaxlib 0.10.2, numpy 2.4.6, CPU backend. The docstring of cumsum says that it
# keeps the dtype, and two closed reports say that sum does not. We found nothing about repeat and
# bincount.
#
# Why it matters in meta-learning with JAX: tasks of few examples have sizes that fit in uint8.
# Where tasks lie one after another in one array, repeat gives each row the number of its task, and
# a cumsum of sizes gives the first row of each task. Below, 703 of 722 rows get the number of
# another task from repeat, and 39 of 60 tasks read the rows of others by offset. All numbers are in
# range.
#
# What to do: make sizes int32 first, or pass dtype=jnp.int32 to cumsum. Make weights float32 before
# bincount. shrinkmeta sums sizes with NumPy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 scipy==1.17.1
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
warnings.simplefilter("error")
ones = np.ones(300, np.uint8)
zeros = np.zeros(300, np.int32)
x = jnp.array(ones)
rows = {
  "numpy: cumsum": (np.cumsum(ones)[-1], 300),
  "numpy: bincount": (np.bincount(zeros, weights=ones)[0], 300),
  "sum": (jnp.sum(x), 300),
  "cumulative_sum": (jnp.cumulative_sum(x)[-1], 300),
  "cumsum of booleans": (jnp.cumsum(x == 1)[-1], 300),
  "cumsum, dtype=int32": (jnp.cumsum(x, dtype=jnp.int32)[-1], 300),
  "cumsum": (jnp.cumsum(x)[-1], 44),
  "cumsum under jit": (jax.jit(jnp.cumsum)(x)[-1], 44),
  "nancumsum": (jnp.nancumsum(x)[-1], 44),
  "method": (x.cumsum()[-1], 44),
  "add.accumulate": (jnp.add.accumulate(x)[-1], 44),
  "bincount": (jnp.bincount(zeros, weights=x, length=1)[0], 44),
  "cumsum of 200 int8": (jnp.cumsum(jnp.ones(200, jnp.int8))[-1], -56),
}
print("300 ones of type uint8")
for name, (found, want) in rows.items():
  print(f"  {name:20} {found.dtype!s:8} {found}")
  assert found == want, f"changed: {name}"

# 60 tasks with 5 to 19 rows each, one after another; the mean of a task is the number of the task.
rng = np.random.default_rng(0)
sizes = jnp.array(rng.integers(5, 20, 60), jnp.uint8)
tasks, total = np.arange(60), int(sizes.sum())
values = jnp.array(np.repeat(tasks, sizes), jnp.float32)


@jax.jit
def means(ends):
  """Return the mean of the rows of each task."""
  first = ends - sizes
  read = first[:, None].astype(jnp.int32) + jnp.arange(20)
  mask = jnp.arange(20) < sizes[:, None]
  return jnp.sum(values[read] * mask, axis=1) / sizes


right = means(jnp.cumsum(sizes, dtype=jnp.int32))
wrong = means(jnp.cumsum(sizes))
off = int((jnp.abs(wrong - right) > 0.5).sum())
print(f"{values.size} rows; means of tasks 0, 10, ..., 50")
print("  int32", np.asarray(right[::10]).round(2))
print("  uint8", np.asarray(wrong[::10]).round(2), f"- {off} of 60 tasks read other tasks")
repeated = {
  "sizes uint8": jnp.repeat(tasks, sizes),
  "sizes uint8, total given": jnp.repeat(tasks, sizes, total_repeat_length=total),
  "sizes int32": jnp.repeat(tasks, sizes.astype(jnp.int32)),
  "sizes int32, total given": jnp.repeat(
    tasks, sizes.astype(jnp.int32), total_repeat_length=total
  ),
}
errors = {}
print("jnp.repeat: length, rows with the number of another task")
for name, ids in repeated.items():
  errors[name] = int((ids[:total] != values[: ids.size]).sum())
  print(f"  {name:26} {ids.size} {errors[name]}", np.asarray(ids[::100]))
assert errors["sizes int32"] == errors["sizes int32, total given"] == 0, "changed: repeat, int32"
assert errors["sizes uint8, total given"] > 300, "changed: repeat, uint8"
assert jnp.allclose(right, jnp.arange(60.0), atol=1e-4), "changed: int32"
assert off >= 20, "changed: the offsets do not wrap"
END
