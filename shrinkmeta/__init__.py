"""Shrinkage meta-learning: learn which modules are task-specific, and how far each may adapt.

The first use of a name below imports `shrinkmeta.public`, and JAX with it. `shrinkmeta.mixed` and
`shrinkmeta.formulas` need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from shrinkmeta import mixed as mixed
  from shrinkmeta.public import *  # noqa: F403

__version__ = "0.1.0"

# Names are grouped by purpose. The formatter would put every name on a line of its own.
# fmt: off
__all__ = (
  # The data of tasks.
  "Batch", "Task", "num_tasks", "source", "stack_batches", "stack_tasks",
  # Likelihoods.
  "Likelihood", "bernoulli", "categorical", "gaussian", "gaussian_with_scale",
  "in_precision", "mean_and_scale", "poisson", "with_constants", "with_randomness",
  # Modules: which parameters share one sigma.
  "Labels", "by_layer", "by_leaf", "by_path", "merge", "task_axes",
  "ModuleSummary", "format_summary", "module_summary",
  # Densities and priors.
  "log_joint", "log_likelihood", "log_predictive", "log_prior", "priors",
  # Settings.
  "Algorithm", "Implicit", "Inner", "LogDet", "lbfgs",
  # Algorithms.
  "FAMILY", "anil", "boil", "empirical_bayes", "fine_tuning", "fomaml", "hand_picked", "imaml",
  "make_learner", "maml", "meta_sgd", "no_adaptation", "reptile",
  "sigma_imaml", "sigma_maml", "sigma_reptile",
  # Learners, their states and what they report.
  "MetaLearner", "MetaParams", "MetaState", "Metrics", "WarmStart", "clip_tasks",
  "EvidenceInfo", "InnerInfo", "SolveInfo",
  # The mode and the evidence of one task.
  "log_evidence", "map_estimate", "restriction",
  # Uncertainty.
  "Calibration", "Posterior", "Predictive", "calibration", "coverage", "posterior",
  # Training.
  "Checkpoints", "fit", "restore", "save_state",
  "Difference", "Evaluation", "Interval", "evaluate", "paired",
  "Callback", "json_lines", "progress_bar", "read_json_lines", "recorder", "tensorboard",
  # Devices and memory.
  "check_alike", "check_shared",
  "over_tasks", "place_state", "place_tasks", "share_of_tasks", "task_mesh",
  "ProgramCost", "program_cost",
  # Use the learned sigma: choose modules, store and serve tasks, build adapters.
  "Choice", "choose_modules",
  "Deltas", "deltas", "export", "load_deltas", "lora", "predict_tasks", "rounding_loss",
  "save_deltas",
  # Pictures.
  "plots",
  # Check the gradient.
  "GradientCheck", "check_meta_gradient",
)
# fmt: on

if not TYPE_CHECKING:  # for a type checker every name would be there

  def __getattr__(name: str) -> Any:
    if name == "mixed":
      return importlib.import_module("shrinkmeta.mixed")
    if name not in __all__:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("shrinkmeta.public")
    for each in __all__:
      globals().setdefault(each, getattr(public, each))
    return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, "mixed"})
