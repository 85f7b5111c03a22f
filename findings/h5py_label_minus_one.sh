#!/usr/bin/env bash
# A reasonable guess: labels with -1 for padding, written to an HDF5 data set of type uint8, raise
# an error, or become 255, as by astype(np.uint8). 255 is no class, so it shows.
#
# What happens: they become 0, a class. HDF5 moves numbers out of range to the nearest end: -1 and
# -7 become 0, 256 and 300 become 255. There is neither an error nor a warning. But the same numbers
# written one at a time wrap as in NumPy: 255, 249, 0 and 44. A list instead of an array raises an
# error. Reading with .astype("uint8") moves numbers to the ends too.
#
# Versions: h5py 3.16.0, numpy 2.4.6. A page of HDF5 for programmers in C describes the rule; we
# found nothing about it in the documentation of h5py.
#
# Why it matters in meta-learning with JAX: tasks have different sizes and are padded with the
# label -1; uint8 is enough for few-shot classes. After a round trip no label is negative, so the
# mask is empty, and class 0 gets all the padding: below its share rises from 20 to 60 %. Losses
# stay finite, and a constant answer of class 0 looks far better than chance.
#
# What to do: store labels in a signed dtype, or check labels.min() and labels.max() before writing.
# Store the mask or the sizes as well. shrinkmeta takes a mask beside the labels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  h5py==3.16.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import warnings

import h5py
import numpy as np

print("h5py", h5py.__version__, "numpy", np.__version__, "HDF5", h5py.version.hdf5_version)
warnings.simplefilter("error")
values = np.array([-1, -7, 3, 256, 300])
found = {"numpy: astype": values.astype(np.uint8)}
with h5py.File("tasks.h5", "w") as file:
  found["create_dataset(data=...)"] = file.create_dataset("a", data=values, dtype=np.uint8)[...]
  whole = file.create_dataset("b", shape=len(values), dtype=np.uint8)
  whole[...] = values
  found["all at once"] = whole[...]
  slices = file.create_dataset("c", shape=len(values), dtype=np.uint8)
  for i in range(len(values)):
    slices[i : i + 1] = values[i : i + 1]
  found["slices of one"] = slices[...]
  single = file.create_dataset("d", shape=len(values), dtype=np.uint8)
  for i, value in enumerate(values):
    single[i] = value
  found["one at a time"] = single[...]
  found["read as uint8"] = file.create_dataset("e", data=values).astype(np.uint8)[...]
  found["remedy: int16"] = file.create_dataset("f", data=values, dtype=np.int16)[...]
  try:
    whole[...] = values.tolist()
    refused = False
  except OverflowError:
    refused = True
print("written:", values.tolist(), "- as a list:", "refused" if refused else "accepted")
wrapped, moved = [255, 249, 3, 0, 44], [0, 0, 3, 255, 255]
for name, row in found.items():
  print(f"  {name:26}", row.tolist())
  want = wrapped if name in ("numpy: astype", "one at a time") else moved
  want = values.tolist() if "remedy" in name else want
  assert row.tolist() == want, f"changed: {name}"
assert refused, "changed: a list"

# 200 tasks of five classes, between 1 and 19 examples, padded to 20.
random = np.random.default_rng(0)
sizes = random.integers(1, 20, size=200)
labels = random.integers(0, 5, size=(200, 20))
labels[np.arange(20) >= sizes[:, None]] = -1
with h5py.File("labels.h5", "w") as file:
  file.create_dataset("y", data=labels, dtype=np.uint8)
with h5py.File("labels.h5") as file:
  read = file["y"][...].astype(int)
before, after = labels[labels >= 0], read[(read >= 0) & (read < 5)]
shares = (before == 0).mean(), (after == 0).mean()
print(f"labels in use: {before.size} before, {after.size} after", end="; ")
print(f"share of class 0: {shares[0]:.2f} before, {shares[1]:.2f} after")
assert after.size == labels.size and shares[1] > 0.5, "changed: padding"
END
