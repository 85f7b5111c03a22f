"""Shrinkage meta-learning: learn which modules are task-specific, and how far each may adapt."""

from shrinkmeta import plots
from shrinkmeta.adapters import export, lora
from shrinkmeta.algorithms.at_the_mode import empirical_bayes, imaml, sigma_imaml, sigma_reptile
from shrinkmeta.algorithms.baselines import anil, boil, fine_tuning, hand_picked, no_adaptation
from shrinkmeta.algorithms.table import FAMILY
from shrinkmeta.algorithms.through_steps import fomaml, maml, meta_sgd, reptile, sigma_maml
from shrinkmeta.base import (
  EvidenceInfo,
  InnerInfo,
  MetaLearner,
  MetaParams,
  MetaState,
  Metrics,
  SolveInfo,
  WarmStart,
)
from shrinkmeta.choice.choose import Choice, choose_modules
from shrinkmeta.config import Algorithm, Implicit, Inner, LogDet
from shrinkmeta.data.source import source
from shrinkmeta.devices.batching import num_tasks, over_tasks
from shrinkmeta.devices.memory import ProgramCost, program_cost
from shrinkmeta.devices.placement import place_state, place_tasks, share_of_tasks, task_mesh
from shrinkmeta.devices.processes import check_alike, check_shared
from shrinkmeta.diagnostics.evaluation import Difference, Evaluation, Interval, evaluate, paired
from shrinkmeta.diagnostics.gradient_check import GradientCheck, check_meta_gradient
from shrinkmeta.diagnostics.summary import ModuleSummary, format_summary, module_summary
from shrinkmeta.gradients.evidence import log_evidence
from shrinkmeta.gradients.implicit import map_estimate
from shrinkmeta.gradients.restriction import restriction
from shrinkmeta.learner.build import make_learner
from shrinkmeta.mode.frozen import merge, task_axes
from shrinkmeta.model import priors
from shrinkmeta.model.density import log_joint, log_likelihood, log_predictive, log_prior
from shrinkmeta.model.likelihood import (
  Likelihood,
  bernoulli,
  categorical,
  gaussian,
  poisson,
)
from shrinkmeta.model.modules import (
  Labels,
  by_layer,
  by_leaf,
  by_path,
)
from shrinkmeta.model.tasks import Batch, Task, stack_batches, stack_tasks
from shrinkmeta.model.variants import (
  gaussian_with_scale,
  in_precision,
  mean_and_scale,
  with_constants,
  with_randomness,
)
from shrinkmeta.quasi_newton import lbfgs
from shrinkmeta.serving.deltas import Deltas, deltas
from shrinkmeta.serving.files import load_deltas, save_deltas
from shrinkmeta.serving.predict import predict_tasks
from shrinkmeta.serving.rounding import rounding_loss
from shrinkmeta.training.callbacks import (
  Callback,
  json_lines,
  progress_bar,
  read_json_lines,
  recorder,
  tensorboard,
)
from shrinkmeta.training.checkpoints import Checkpoints, restore
from shrinkmeta.training.fit import fit
from shrinkmeta.training.states.save import save_state
from shrinkmeta.uncertainty.calibration import Calibration, calibration, coverage
from shrinkmeta.uncertainty.laplace import posterior
from shrinkmeta.uncertainty.posterior import Posterior, Predictive

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
  "MetaLearner", "MetaParams", "MetaState", "Metrics", "WarmStart",
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
