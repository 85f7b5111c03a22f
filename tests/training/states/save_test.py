"""A state is saved without `fit` and read by a learner that was built again."""

import chex
import jax.numpy as jnp
import pytest

import shrinkmeta as sm

LABELS = {"w": "w", "b": "b"}


def built(w, constants):
  """A learner, and its state of the given values, in which only b is task-specific."""
  likelihood = sm.gaussian(lambda p, x, constants: x * constants["scale"] @ p["w"] + p["b"], 1.0)
  learner = sm.sigma_imaml(likelihood, LABELS)
  state = learner.init({"w": jnp.full(3, w), "b": jnp.full([], w)}, constants=constants)
  return learner, state, *learner.keep(state, ["b"])


@pytest.fixture(name="saved")
def fixture_saved(tmp_path):
  _, _, small, state = built(1.5, {"scale": jnp.full(3, 2.0)})
  kept = sm.Checkpoints(tmp_path / "model", constants=True)
  sm.save_state(kept, small, state)
  return kept, state


def test_another_process_reads_the_state(saved):
  kept, state = saved
  learner, blank, small, blank_small = built(0.0, {"scale": jnp.zeros(3)})
  chex.assert_trees_all_equal(sm.restore(kept, small, blank_small), state)
  with pytest.raises(ValueError, match="another run: sigma of w: '0' in it, absent here"):
    sm.restore(kept, learner, blank)


def test_a_folder_with_other_states_is_refused(saved):
  kept, state = saved
  learner, other, small, _ = built(0.0, {"scale": jnp.zeros(3)})
  with pytest.raises(ValueError, match="already has a state of step 0.*Name another folder"):
    sm.save_state(kept, small, state)
  later = state._replace(step=state.step + 1)
  sm.save_state(kept, small, later)
  chex.assert_trees_all_equal(sm.restore(kept, small, state), later)
  with pytest.raises(ValueError, match="state of step 1, and the steps in a folder must increase"):
    sm.save_state(kept, small, state)  # orbax would skip it without a word
  with pytest.raises(ValueError, match="another run: sigma of w"):
    sm.save_state(kept, learner, other._replace(step=state.step + 2))
  chex.assert_trees_all_equal(sm.restore(kept, small, state), later)


def test_a_state_of_another_learner_and_a_damaged_folder_are_refused(saved, tmp_path):
  kept, state = saved
  _, before, small, _ = built(1.0, {"scale": jnp.ones(3)})
  with pytest.raises(ValueError, match="Module 'w' is kept at phi here, but its sigma is"):
    sm.save_state(sm.Checkpoints(tmp_path / "other"), small, before)
  assert not (tmp_path / "other").exists()
  (newest,) = (path for path in (tmp_path / "model").iterdir() if path.name == "0")
  for path in (newest / "about").rglob("*"):
    if path.is_file():
      path.write_bytes(b"{")
  with pytest.raises(OSError, match="0 is damaged: .*Name another folder"):
    sm.save_state(kept, small, state._replace(step=state.step + 1))
