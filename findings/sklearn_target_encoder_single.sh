#!/usr/bin/env bash
# A reasonable guess: the empirical Bayes estimate of TargetEncoder(smooth="auto") shrinks a group
# of one row more than any other group, nearly to the mean of all rows.
#
# What happens: such a group is not shrunk at all. Its encoding is its own target, to the last bit.
# The variance within a group is estimated from that group alone, and with one row it is 0, so the
# data look exact. Any group whose targets are equal is taken as it is, such as three labels 1.
# The weight of a group's own mean falls from 1 at one row to 0.88 at five and then rises. And the
# column has two meanings: fit_transform, which fits on other rows, gives a training row of such a
# group the mean of all, and transform gives the same row its own target.
#
# Versions: scikit-learn 1.9.1 with numpy 2.4.6. The docstring calls the estimate empirical Bayes and
# does not mention this case.
#
# Why it matters in meta-learning with JAX: tasks with one example are the reason for shrinkage.
# Here their squared error is nine times that of the mean of all rows, so the encoder is a bad
# baseline and a bad feature where it should help most.
#
# What to do: pass smooth = variance within / variance between groups. sm.mixed has one residual
# variance for all groups and estimates it together with the variance between them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
import sklearn
from sklearn.preprocessing import TargetEncoder

print("scikit-learn", sklearn.__version__, "numpy", np.__version__)
within, between = 1.0, 0.09
rng = np.random.default_rng(0)
rows = np.repeat([1, 2, 5, 20], 200)
group = np.repeat(np.arange(800), rows)
effect = rng.normal(0, between**0.5, 800)
y = effect[group] + rng.normal(0, within**0.5, group.size)
raw = np.bincount(group, y) / rows


def encodings(smooth):
  encoder = TargetEncoder(smooth=smooth, target_type="continuous").fit(group[:, None], y)
  return encoder.encodings_[0], encoder.target_mean_


weight, error = {}, {}
print("rows  smooth   weight of the own mean   squared error")
for n in (1, 2, 5, 20):
  of = rows == n
  for name, smooth in (("auto", "auto"), ("11.1", within / between)):
    code, mean = encodings(smooth)
    weight[name, n] = np.median(((code - mean) / (raw - mean))[of])
    error[name, n] = np.mean((code - effect)[of] ** 2)
    print(f"{n:4}  {name:6} {weight[name, n]:20.3f} {error[name, n]:18.3f}")
  print(f"{n:4}  mean   {0:20.3f} {np.mean((mean - effect)[of] ** 2):18.3f}")
encoder = TargetEncoder(smooth="auto", target_type="continuous")
trained = encoder.fit_transform(group[:, None], y)[:3, 0]
later = encoder.transform(group[:3, None])[:, 0]
print("targets of three groups of one row ", y[:3].round(4))
print("fit_transform                      ", trained.round(4))
print("transform                          ", later.round(4))
labels = TargetEncoder().fit([["a"]] * 3 + [["b"], ["c"], ["c"]], [1, 1, 1, 0, 1, 0])
print("labels a: 1 1 1, b: 0, c: 1 0      ", labels.encodings_[0].round(3))

assert np.array_equal(later, y[:3]), "changed: groups of one row are shrunk"
assert np.abs(trained).max() < 0.05, "changed: fit_transform"
assert weight["auto", 1] > weight["auto", 2] > weight["auto", 5], "changed: the weight grows"
assert weight["11.1", 1] < 0.1 and weight["11.1", 20] > 0.6, "changed: a number"
assert error["auto", 1] > 9 * error["11.1", 1], "changed: the error"
assert labels.encodings_[0][:2].tolist() == [1, 0], "changed: equal labels are shrunk"
END
