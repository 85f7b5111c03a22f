"""Shrinkage meta-learning: which modules does each task need for itself, how far may they go?"""

from shrinkmeta.algorithms import (
  FAMILY,
  anil,
  boil,
  empirical_bayes,
  fine_tuning,
  fomaml,
  hand_picked,
  imaml,
  maml,
  meta_sgd,
  no_adaptation,
  reptile,
  sigma_imaml,
  sigma_maml,
  sigma_reptile,
)
from shrinkmeta.base import MetaLearner, MetaState, Metrics
from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.devices.batching import num_tasks, over_tasks
from shrinkmeta.devices.memory import ProgramCost, program_cost
from shrinkmeta.devices.placement import place_state, place_tasks, share_of_tasks, task_mesh
from shrinkmeta.gradient_check import GradientCheck, check_meta_gradient
from shrinkmeta.gradients.evidence import EvidenceInfo, log_evidence, restriction
from shrinkmeta.gradients.implicit import Implicit, MetaParams, map_estimate
from shrinkmeta.gradients.log_det import LogDet
from shrinkmeta.gradients.per_task import Algorithm
from shrinkmeta.learner import make_learner
from shrinkmeta.mode.frozen import merge
from shrinkmeta.mode.optimise import Inner, InnerInfo
from shrinkmeta.mode.warm_start import WarmStart
from shrinkmeta.model import priors
from shrinkmeta.model.density import log_joint, log_likelihood, log_predictive, log_prior
from shrinkmeta.model.likelihood import (
  Likelihood,
  bernoulli,
  categorical,
  gaussian,
  gaussian_with_scale,
  in_precision,
  mean_and_scale,
  poisson,
)
from shrinkmeta.model.modules import (
  Labels,
  ModuleSummary,
  by_layer,
  by_leaf,
  by_path,
  format_summary,
  module_summary,
)
from shrinkmeta.model.tasks import Batch, Task, stack_batches, stack_tasks
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
from shrinkmeta.uncertainty.calibration import Calibration, calibration, coverage
from shrinkmeta.uncertainty.posterior import Posterior, Predictive, posterior

__version__ = "0.1.0"

__all__ = (
  "FAMILY",
  "Batch",
  "Calibration",
  "Callback",
  "Checkpoints",
  "ProgramCost",
  "EvidenceInfo",
  "GradientCheck",
  "Implicit",
  "Inner",
  "InnerInfo",
  "Labels",
  "Likelihood",
  "LogDet",
  "MetaLearner",
  "MetaParams",
  "MetaState",
  "Metrics",
  "ModuleSummary",
  "Posterior",
  "Predictive",
  "Algorithm",
  "SolveInfo",
  "Task",
  "WarmStart",
  "anil",
  "bernoulli",
  "boil",
  "by_layer",
  "by_leaf",
  "by_path",
  "calibration",
  "categorical",
  "check_meta_gradient",
  "coverage",
  "empirical_bayes",
  "program_cost",
  "fine_tuning",
  "fit",
  "fomaml",
  "format_summary",
  "gaussian",
  "gaussian_with_scale",
  "hand_picked",
  "priors",
  "imaml",
  "in_precision",
  "json_lines",
  "log_evidence",
  "log_joint",
  "log_likelihood",
  "log_predictive",
  "log_prior",
  "make_learner",
  "maml",
  "meta_sgd",
  "mean_and_scale",
  "map_estimate",
  "merge",
  "module_summary",
  "no_adaptation",
  "num_tasks",
  "over_tasks",
  "place_state",
  "place_tasks",
  "poisson",
  "posterior",
  "progress_bar",
  "read_json_lines",
  "recorder",
  "reptile",
  "restore",
  "restriction",
  "share_of_tasks",
  "sigma_imaml",
  "sigma_maml",
  "sigma_reptile",
  "stack_batches",
  "stack_tasks",
  "task_mesh",
  "tensorboard",
)
