import ml_collections
import pytest

from experiments.settings import algorithms, tables


@pytest.mark.parametrize("table", tables.TABLES)
@pytest.mark.parametrize("size", tables.SIZES)
def test_every_table_has_every_arm_and_reports_a_step_that_it_records(table, size):
  config = tables.load(table, size)
  assert set(config.arms) == set(algorithms.ALL)
  assert config.report_step in config.adapt_steps
  assert isinstance(config, ml_collections.ConfigDict)


@pytest.mark.parametrize("table", ("alphabets", "small_data", "more_data", "few_shot"))
def test_algorithms_that_share_a_cut_were_searched_with_it(table):
  """A module is a block for algorithms with a mode; for sigma_maml, as for meta_sgd, a layer."""
  found = tables.load(table, "cpu").arms
  assert {found[name].modules for name in ("sigma_imaml", "sigma_reptile")} == {"block"}
  assert {found[name].modules for name in ("sigma_maml", "meta_sgd", "hand_picked")} == {"layer"}
  assert all(arm.trials >= 6 for arm in found.values())


def test_an_unknown_size():
  with pytest.raises(ValueError, match="cpu, full, smoke; got 'glyphs' and 'huge'"):
    tables.load("glyphs", "huge")
