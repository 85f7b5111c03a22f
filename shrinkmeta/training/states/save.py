"""Save one state without `fit`."""

import jax
import jax.numpy as jnp

from shrinkmeta.base import MetaLearner, MetaState, check_learner, check_state
from shrinkmeta.checks import validate
from shrinkmeta.checks.paths import local_path
from shrinkmeta.mode.frozen import check_own
from shrinkmeta.training.checkpoint_format import check_description, describing, read_description
from shrinkmeta.training.checkpoints import ABOUT, Checkpoints, opened
from shrinkmeta.training.states.damage import attempt, finished_steps


def save_state(checkpoints: Checkpoints, learner: MetaLearner, state: MetaState) -> None:
  """Save one state, such as that of `learner.keep`, for `sm.restore` in another process.

  The checkpoint has the format of those of `fit`. It is written under another name and renamed at
  the end, so a killed process leaves no half-written checkpoint. Use it in a run of one
  process; in a run of several, let `fit` save the state. Call it outside jit.

  Args:
    checkpoints: the folder, and whether the constants are stored too. The folder keeps the last
      `keep` states. Name another folder than that of `fit`.
    learner: the learner of the state. The learner that reads the state needs the same modules and
      optimisers, the same `restricted`, and the same sigma wherever sigma is not learned.
    state: the state. Its optimisers' states are saved too.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: the state is not of this learner, the folder has states of another learner or a
      state of this step or a later one, or there are several processes.
    OSError: the folder cannot be written to, or its newest state is damaged.

  Example:
    >>> import tempfile, jax.numpy as jnp, shrinkmeta as sm
    >>> learner = sm.sigma_maml(sm.gaussian(lambda p, x: p["a"] * x + p["b"]), {"a": "a", "b": "b"})
    >>> small, state = learner.keep(learner.init({"a": 1.0, "b": 0.5}), ["b"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   sm.save_state(sm.Checkpoints(folder), small, state)
    ...   _, blank = learner.keep(learner.init({"a": 0.0, "b": 0.0}), ["b"])  # in the other process
    ...   restored = sm.restore(sm.Checkpoints(folder), small, blank)
    >>> float(restored.phi["a"]), float(restored.phi["b"])
    (1.0, 0.5)
  """
  validate.instance("checkpoints", checkpoints, Checkpoints, "a shrinkmeta.Checkpoints(folder)")
  check_learner("learner", learner)
  check_state("state", state)
  if jax.process_count() > 1:
    raise ValueError(
      f"save_state works in a run of one process; this run has {jax.process_count()}. Let sm.fit "
      "save the state."
    )
  state = jax.tree.map(jnp.asarray, state)
  check_own(learner.spec, state.log_sigma2)
  folder = local_path("Checkpoints.folder", checkpoints.folder).absolute()
  step, steps = int(state.step), finished_steps(folder)
  if steps:
    newest = folder / str(steps[-1])
    wanted = describing(learner, checkpoints.settings, checkpoints.constants)(state)
    found, error = attempt(lambda: read_description(newest / ABOUT))
    if found is None:
      raise OSError(f"{newest} is damaged: {error}. Name another folder.")
    check_description(found, wanted, newest)
    if step <= steps[-1]:
      raise ValueError(
        f"{folder} already has a state of step {steps[-1]}, and the steps in a folder must "
        f"increase; this state is that of step {step}. Name another folder."
      )
  with opened(checkpoints, learner) as store:
    store.save(state)
