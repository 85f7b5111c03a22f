#!/usr/bin/env bash
# A reasonable guess: sklearn.metrics.log_loss of a prediction that gives the true class
# probability 0 is inf, or at least a number that does not depend on the dtype.
#
# What happens: it depends on the dtype of the probabilities, because they are clipped to the
# machine epsilon of that dtype: 36.04 nats in float64, 15.94 in float32, 6.93 in float16. A
# float32 probability of 1e-9, true cost 20.7 nats, counts 15.94 too.
#
# Versions: scikit-learn 1.9.1 with numpy 2.4.6.
#
# Why it matters in meta-learning with JAX: predictions from JAX are float32. A few confidently
# wrong predictions per task dominate the test likelihood, which is where learned sigma and point
# estimates differ most; here they all cost the same. The same predictions stored in float16 look
# better by 9 nats each.
#
# What to do: compute the likelihood from logits, with log_softmax, as shrinkmeta does, and convert
# to float64 before log_loss is used as a reference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  scikit-learn==1.9.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
from sklearn.metrics import log_loss


def cost(probability, dtype):
  """Nats for one example whose true class got `probability`."""
  table = np.array([[1 - probability, probability]], dtype)
  return float(log_loss([1], table, labels=[0, 1]))


expected = {"float64": 36.04, "float32": 15.94, "float16": 6.93}
for dtype, value in expected.items():
  zero, small = cost(0.0, dtype), cost(1e-9, dtype)
  print(f"{dtype}: probability 0 costs {zero:.2f}, probability 1e-9 costs {small:.2f} nats")
  assert abs(zero - value) < 0.02, f"changed: {dtype}"
print(f"-log(1e-9) is {-np.log(1e-9):.2f}")
assert abs(cost(1e-9, "float64") - 20.72) < 0.01, "changed: float64, 1e-9"
assert abs(cost(1e-9, "float32") - 15.94) < 0.02, "changed: float32, 1e-9"
END
