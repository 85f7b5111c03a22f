import pytest

from experiments.settings import schema, tables


def test_overrides():
  config = tables.load(
    "glyphs", "smoke", ["meta_steps=7", "network.norm=group", "arms.reptile.inner_rate=0.25"]
  )
  assert (config.meta_steps, config.network.norm, config.arms.reptile.inner_rate) == (
    7,
    "group",
    0.25,
  )


@pytest.mark.parametrize(
  "override", ["meta_step=7", "meta_steps", "arms.maml.lr=1", "meta_steps=x"]
)
def test_an_override_that_does_not_fit_is_named(override):
  with pytest.raises(ValueError, match=override.partition("=")[0]):
    tables.load("glyphs", "smoke", [override])


@pytest.mark.parametrize(
  "change",
  (
    *("meta_steps=0", "meta_batch=0", "test_episodes=0", "adapt_steps=(3,1)", "adapt_steps=(-1,3)"),
    *("adapt_steps=(0,True)", "meta_steps=True", "cg_steps=0", "cg_batch=-1", "cg_tol=0.0"),
    *("network.features=0", "evaluation.block=0", "arms.maml.inner_steps=0"),
    *("arms.maml.batch_size=-1", "arms.maml.inner_rate=0.0", "arms.maml.outer_rate=-1.0"),
    *("arms.maml.inner_rate=1e999", "arms.imaml.init_sigma=0.0", "arms.meta_sgd.sigma_rate=-0.1"),
  ),
)
def test_what_would_fail_in_training_is_refused(change):
  name = change.partition("=")[0]
  with pytest.raises(ValueError, match=f"--set={name}"):
    tables.load("glyphs", "smoke", [change])


def test_a_layer_has_units():
  with pytest.raises(ValueError, match="network.width is at least 1; got 0"):
    tables.load("sinusoid", "smoke", ["network.width=0"])


def test_a_dtype_that_does_not_exist():
  with pytest.raises(ValueError, match="compute is float32 or bfloat16; got 'bfloat15'"):
    tables.load("sinusoid", "smoke", ["compute=bfloat15"])
  assert tables.load("sinusoid", "smoke", ["compute=bfloat16"]).compute == "bfloat16"


@pytest.mark.parametrize(
  "change",
  ("table=glyphs", "size=cpu", "arms.maml.trials=3", "arms.maml.searched_with=shots=1"),
)
def test_where_settings_come_from_is_no_change(change):
  with pytest.raises(ValueError, match=f"--set={change.partition('=')[0]} would change how"):
    tables.load("glyphs", "smoke", [change])


def test_a_setting_of_a_group_is_named_whole():
  with pytest.raises(ValueError, match="Did you mean problem.ways[?]"):
    tables.load("glyphs", "smoke", ["ways=7"])


def test_a_table_has_the_settings_of_the_schema():
  config = tables.load("sinusoid", "smoke").unlock()
  config.momentum = 0.9
  with pytest.raises(ValueError, match=r"missing are \[\], unknown are \['momentum'\]"):
    schema.check(config)
  del config["momentum"], config["cg_tol"]
  with pytest.raises(ValueError, match=r"missing are \['cg_tol'\]"):
    schema.check(config)
  config = tables.load("sinusoid", "smoke").unlock()
  config.arms.maml.momentum = 0.9
  with pytest.raises(ValueError, match=r"arms.maml .*unknown are \['momentum'\]"):
    schema.check(config)
  config = tables.load("glyphs", "smoke").unlock()
  del config.evaluation["block"]
  with pytest.raises(ValueError, match="evaluation has block, key, over; got"):
    schema.check(config)


@pytest.mark.parametrize(
  "text, wanted",
  (
    ("meta_steps=1e3", 1_000),
    ("meta_steps=100.0", 100),
    ("meta_steps=np.int64(7)", 7),
    ("cg_tol=np.float64(0.01)", 0.01),
    ("meta_steps= 5 ", 5),
  ),
)
def test_a_change_as_programs_and_spreadsheets_write_it(text, wanted):
  config = tables.load("sinusoid", "smoke", [text])
  found = config[text.partition("=")[0]]
  assert found == wanted and type(found) is type(wanted)


def test_a_fraction_of_a_step_is_refused():
  with pytest.raises(ValueError, match="meta_steps=1.5 does not fit the settings"):
    tables.load("sinusoid", "smoke", ["meta_steps=1.5"])
