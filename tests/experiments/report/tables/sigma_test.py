import numpy as np
from absl.testing import absltest, parameterized

from experiments.report.tables import sigma as sigma_tables
from experiments.runs import results
from tests.experiments.report.curves import curve, rows


class SigmaTest(parameterized.TestCase):
  def test_modules(self):
    cells = rows(sigma_tables.module_table(curve()))
    self.assertEqual(list(cells)[2:], ["conv_0", "norm_0", "head"])
    self.assertEqual(cells["conv_0"], ["320", "0 (frozen)", "0"])
    self.assertEqual(cells["norm_0"], ["64", "0.25", "0.125"])
    self.assertEqual(cells["head"], ["1,290", "∞ (no prior)", "0.5"])

  def test_freezing(self):
    whole = [curve(seed=seed) for seed in (0, 1)]
    sigma = {"conv_0": 0.0, "norm_0": 0.0, "head": 0.5}
    held = [
      c._replace(accuracy=c.accuracy - 0.01, nll=c.nll + 0.125, sigma={**sigma, "norm_0": norm})
      for c, norm in zip(whole, (0.0, 0.3), strict=True)
    ]
    cells = rows(sigma_tables.freezing_table(whole, {0.2: held, 0.1: whole}))
    share = 100 * (1_290 + 64 / 2) / (320 + 64 + 1_290)
    self.assertEqual(list(cells)[2:], ["0.1", "0.2"])
    wanted = ["norm_0 (1 of 2), head", f"{share:.1f}", "-1.00 ± 0.00", "+0.125 ± 0.000"]
    self.assertEqual(cells["0.2"], wanted)
    self.assertEqual(cells["0.1"][2:], ["+0.00 ± 0.00", "+0.000 ± 0.000"])
    with self.assertRaisesRegex(ValueError, r"below 0.1 are frozen in seeds \[0\].*\[0, 1\]"):
      sigma_tables.freezing_table(whole, {0.1: held[:1]})

  def test_thresholds_that_agree_in_six_digits(self):
    cells = rows(
      sigma_tables.freezing_table([curve()], {0.1234561: [curve()], 0.1234562: [curve()]})
    )
    self.assertEqual(list(cells)[2:], ["0.1234561", "0.1234562"])

  def test_found_modules(self):
    make = lambda seed, head: curve(seed=seed, sigma={"conv_0": 0.2, "norm_0": 0.0, "head": head})
    table = sigma_tables.found_modules({"Omniglot": [make(0, 0.1), make(1, 1.6)]})
    self.assertEqual(rows(table)["Omniglot"], ["sigma_imaml", "head 0.4, conv_0 0.2, norm_0 0"])
    two = [make(0, 0.1), make(1, 1.6)]  # the head is second in one seed, first in the other
    found = rows(sigma_tables.sigma_table([*two, curve("sigma_maml")]))
    self.assertEqual(found["sigma_imaml"], ["0.50", "none", "head 0.4, conv_0 0.2, norm_0 0"])
    self.assertEqual(found["sigma_maml"][0], "none")  # one seed
    moving = [make(0, 0.1)._replace(sigma={"a": 1.0, "b": 2.0, "c": 4.0}) for _ in (0, 1)]
    moving[1] = moving[1]._replace(seed=1, sigma={"a": 1.0, "b": 4.0, "c": 2.0})
    self.assertEqual(rows(sigma_tables.sigma_table(moving))["sigma_imaml"][:2], ["0.50", "0.50"])
    frozen = [curve(seed=s, sigma=dict.fromkeys(("conv_0", "norm_0", "head"), 0.0)) for s in (0, 1)]
    self.assertEqual(rows(sigma_tables.sigma_table(frozen))["sigma_imaml"][0], "none")


def test_sigma_agreement_is_the_mean_rank_correlation_of_pairs():
  make = lambda seed, sigma: results.Curve(
    algorithm="sigma_imaml",
    seed=seed,
    steps=np.array([0]),
    accuracy=np.zeros((1, 2)),
    nll=np.zeros((1, 2)),
    sigma=dict(zip("abc", sigma, strict=True)),
    moved={},
    sizes=dict.fromkeys("abc", 1),
    seconds={},
    history={},
  )
  curves = [make(0, (0.1, 0.2, 0.3)), make(1, (1.0, 2.0, 3.0)), make(2, (3.0, 2.0, 1.0))]
  found = sigma_tables.sigma_agreement(curves)
  np.testing.assert_allclose(found["sigma_imaml"].ranks, (1 - 1 - 1) / 3)
  logs = np.corrcoef(np.log([list(curve.sigma.values()) for curve in curves]))
  np.testing.assert_allclose(found["sigma_imaml"].logs, (logs[0, 1] + logs[0, 2] + logs[1, 2]) / 3)


if __name__ == "__main__":
  absltest.main()
