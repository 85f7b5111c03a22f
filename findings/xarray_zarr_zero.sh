#!/usr/bin/env bash
# A reasonable guess: xarray reads an array that zarr wrote as zarr reads it. The labels 0, 1, 2 of an
# int32 array are 0, 1, 2.
#
# What happens: in Zarr format 2, every 0 comes back as NaN, and the int32 labels as float64. zarr
# records 0 as the fill value, the value of chunks that nobody wrote, and xarray takes it for the
# mark of a missing value, with use_zarr_fill_value_as_mask=False too. zarr itself reads the zeros.
# In format 3, zarr's default since version 3.0, the labels are right. There is no warning.
#
# Versions: zarr 3.1.6, xarray 2026.9.0, numpy 2.4.6. Public issues of 2021 report it; one is closed.
#
# Why it matters in meta-learning: class 0, task 0, the control group and a centred outcome of
# exactly 0 are the values that vanish. `mean("n")`, over the examples of a task, skips NaN, so
# the mean of a 0/1 outcome is 1.0 for every task that has a 1, and astype(int) makes some other
# integer of NaN.
#
# What to do: open_zarr(..., mask_and_scale=False), or create the array with fill_value=None.
# Compare the dtype with the one that was written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  zarr==3.1.6 xarray==2026.9.0 numpy==2.4.6 pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" -W error - <<'END'
import numpy as np
import xarray as xr
import zarr

print("zarr", zarr.__version__, "xarray", xr.__version__, "numpy", np.__version__)
labels = np.array([[0, 1, 2], [0, 1, 1]])
types = ("int8", "int32", "float32", "bool")


def write(name, zarr_format, **more):
  group = zarr.open_group(name, mode="w", zarr_format=zarr_format)
  for kind in types:
    values = labels.astype(kind)
    names = {"dimension_names": ("task", "n")} if zarr_format == 3 else {}
    array = group.create_array(kind, shape=values.shape, dtype=values.dtype, **names, **more)
    array[:] = values
    if zarr_format == 2:  # the names of dimensions, as xarray's documentation asks
      array.attrs["_ARRAY_DIMENSIONS"] = ["task", "n"]
    assert (array[:] == values).all() and array[:].dtype == values.dtype
  return name


read = lambda name, **more: xr.open_zarr(name, consolidated=False, **more).load()
two, three = write("two.zarr", 2), write("three.zarr", 3)
found = {
  "format 2": read(two),
  "format 2, use_zarr_fill_value_as_mask=False": read(two, use_zarr_fill_value_as_mask=False),
  "format 3": read(three),
  "format 2, mask_and_scale=False": read(two, mask_and_scale=False),
  "format 2, fill_value=None": read(write("none.zarr", 2, fill_value=None)),
}
for words, data in found.items():
  print(words)
  for kind in types:
    print(f"  {kind:8} read as {str(data[kind].dtype):8} {data[kind].values.tolist()}")
outcome = found["format 2"]["int32"].clip(max=1).mean("n").values
print("mean outcome of the two tasks, 0 or 1 for each example:", outcome)
print("true:", (labels > 0).mean(1))

for kind in types:
  for words in list(found)[:2]:
    missing = np.isnan(found[words][kind].values.astype(float))
    assert (missing == (labels.astype(kind) == 0)).all(), f"changed: {words}, {kind}"
  for words in list(found)[2:]:
    data = found[words][kind]
    assert data.dtype == kind and (data.values == labels.astype(kind)).all(), f"changed: {words}"
assert (outcome == 1.0).all(), "changed: the mean"
END
