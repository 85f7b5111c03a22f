#!/usr/bin/env bash
# A reasonable guess: resizing a black-and-white picture with LANCZOS or BOX gives a smooth grey
# picture, or at least a filtered one that is cut to black and white.
#
# What happens: a picture of mode "1" is resized by nearest neighbour, whichever filter is named.
# The result equals that of NEAREST bit for bit, no warning is given, and lines thinner than the
# new pixels can vanish.
#
# Versions: pillow 13.0.0. The documentation of Image.resize says so for the modes "1" and "P".
#
# Why it matters in meta-learning with JAX: the drawings of Omniglot are PNG files of one bit with
# thin strokes, 105 x 105 pixels, and are usually brought to 28 x 28. A pipeline that names LANCZOS
# and forgets convert("L") loses strokes, and its accuracies do not compare with those of one that
# has it.
#
# What to do: convert to "L" before resizing. shrinkmeta's experiments average the ink over each
# new pixel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
from PIL import Image

paper = np.ones((105, 105), bool)
paper[20:90, 52] = False  # a vertical stroke, one pixel wide
paper[51, 20:90] = False
drawing = Image.fromarray(paper)
filters = Image.Resampling
small = {f: np.asarray(drawing.resize((28, 28), f)) for f in filters}
grey = np.asarray(drawing.convert("L").resize((28, 28), filters.LANCZOS))
for f, picture in small.items():
  print(f"mode 1, {f.name:8}: {picture.dtype}, {int((~picture).sum()):3} dark pixels of 784")
print(f"mode L, LANCZOS : {grey.dtype}, {int((grey < 230).sum()):3} pixels darker than 230")
assert drawing.mode == "1"
for f, picture in small.items():
  assert np.array_equal(picture, small[filters.NEAREST]), f"changed: {f.name} is used"
assert (~small[filters.LANCZOS]).sum() < (grey < 230).sum(), "changed: nothing is lost"
END
