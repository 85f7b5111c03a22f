#!/usr/bin/env bash
# A reasonable guess: rps_score(labels, probabilities) counts the K ordered classes from 0, as
# NumPy, scikit-learn and optax do. If it counts from 1, the label 0 is an error.
#
# What happens: it counts from 1 and accepts 0. Label 1 means the first column. Label 0 is read as a
# one-hot row of zeros, so no class occurs. There is neither an error nor a warning. With labels 0,
# ..., 4 a perfect forecast has a score of 5 for class 0 and of 1 for the others. A forecast that is
# always one class too low has 0 for classes 1 to 4. On 2000 ratings the model that knows the truth
# is the worst of three: the same model shifted down by one class scores better, and so does the
# share of each class, the same for all ratings.
#
# Versions: scoringrules 0.10.0, numpy 2.4.6. The formula in the docstring has y from 1 to K; the
# description of the argument does not say where classes begin, and nothing mentions label 0. A
# label above K is accepted too: it is read as no class.
#
# Why it matters in meta-learning with JAX: ratings and severities are ordinal, and labels of
# few-shot classes begin at 0. The scores are finite and of a plausible size, and they choose the
# wrong model. Padding with -1 counts as well, with a score of up to K.
#
# What to do: pass labels + 1, or a one-hot array with onehot=True. Check that a perfect forecast
# has a score of 0. shrinkmeta reports log-likelihoods and does not use this score.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  scoringrules==0.10.0 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import importlib.metadata
import warnings

import numpy as np
import scoringrules as sr

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("scoringrules", "numpy")))
warnings.simplefilter("error")
K = 5
labels, perfect = np.arange(K), np.eye(K)
low = perfect[np.maximum(labels - 1, 0)]
rows = {
  "perfect, labels from 0": (sr.rps_score(labels, perfect), [5, 1, 1, 1, 1]),
  "one class too low": (sr.rps_score(labels, low), [5, 0, 0, 0, 0]),
  "remedy: labels + 1": (sr.rps_score(labels + 1, perfect), [0] * 5),
  "remedy: onehot=True": (sr.rps_score(np.eye(K)[labels], perfect, onehot=True), [0] * 5),
}
print("score of classes 0 to 4")
for name, (found, want) in rows.items():
  print(f"  {name:24}", np.asarray(found).round(3))
  assert np.allclose(found, want), f"changed: {name}"
odd = sr.rps_score(np.array([-1, K + 1]), perfect[[0, 0]])
print(f"  labels -1 and {K + 1}         ", odd.round(3))
assert np.allclose(odd, K), "changed: a label that is no class"

# 2000 ratings. The first model knows the distribution of each, the second is one class too low.
rng = np.random.default_rng(0)
truth = rng.dirichlet(np.full(K, 0.3), 2000)
y = (rng.random((2000, 1)) > truth.cumsum(-1)[:, :-1]).sum(-1)
shifted = np.c_[truth[:, 1:], np.zeros(2000)]
shifted[:, 0] += truth[:, 0]
models = {"the truth": truth, "one class too low": shifted}
models["frequencies"] = np.tile(np.bincount(y, minlength=K) / y.size, (y.size, 1))
zero, one = {}, {}
print("mean score of 2000 ratings".ljust(28), "labels  labels + 1")
for name, p in models.items():
  p = p / p.sum(-1, keepdims=True)
  zero[name], one[name] = sr.rps_score(y, p).mean(), sr.rps_score(y + 1, p).mean()
  print(f"  {name:26} {zero[name]:6.3f} {one[name]:11.3f}")
assert min(one, key=one.get) == "the truth", "changed: labels + 1"
assert max(zero, key=zero.get) == "the truth", "changed: labels from 0"
END
