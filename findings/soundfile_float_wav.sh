#!/usr/bin/env bash
# A reasonable guess: soundfile.read(file, dtype="int16") scales the samples of any WAV file to the
# range of int16.
#
# What happens: a WAV file that stores floating-point samples is converted without scaling. A sine
# of amplitude 0.5 comes back as zeros only. In the other direction, int16 samples written as FLOAT
# are read as floats up to 16383 instead of 0.5. Files of subtype PCM_16 with the same sound are
# right.
#
# Versions: soundfile 0.14.0 with the libsndfile it ships. The soundfile documentation states that
# such reads are not scaled.
#
# Why it matters in meta-learning with JAX: data sets of spoken words mix files of both kinds,
# because a resampled or augmented clip is often saved as FLOAT. Such an example becomes silence
# with a valid label, and its task looks merely hard.
#
# What to do: read with the default dtype (float64) or float32, which are always scaled, and check
# the file's subtype. shrinkmeta's spoken digits are read as float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  soundfile==0.14.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import io

import numpy as np
import soundfile

sine = 0.5 * np.sin(np.arange(800) / 10)


def stored(data, subtype):
  file = io.BytesIO()
  soundfile.write(file, data, 8000, format="WAV", subtype=subtype)
  return file


def loudest(file, dtype):
  file.seek(0)
  return float(np.abs(soundfile.read(file, dtype=dtype)[0].astype(np.float64)).max())


found = {
  (subtype, dtype): loudest(stored(sine, subtype), dtype)
  for subtype in ("PCM_16", "FLOAT")
  for dtype in ("float64", "int16")
}
for (subtype, dtype), value in found.items():
  print(f"stored as {subtype:6} read as {dtype:7}: loudest sample {value}")
integers = loudest(stored((sine * 32767).astype(np.int16), "FLOAT"), "float64")
print(f"int16 samples stored as FLOAT, read as float64: loudest sample {integers}")
assert found["FLOAT", "int16"] == 0, "changed: FLOAT read as int16"
assert found["PCM_16", "int16"] > 16000, "changed: PCM_16 read as int16"
assert abs(found["FLOAT", "float64"] - 0.5) < 1e-3, "changed: FLOAT read as float64"
assert integers > 16000, "changed: int16 written as FLOAT"
END
