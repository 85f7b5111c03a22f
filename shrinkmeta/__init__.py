"""Shrinkage meta-learning: which modules does each task need for itself, how far may they go?"""

from shrinkmeta import hyperprior
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
from shrinkmeta.batching import over_tasks
from shrinkmeta.calibration import Calibration, calibration, coverage
from shrinkmeta.callbacks import (
  Callback,
  json_lines,
  progress_bar,
  read_json_lines,
  recorder,
  tensorboard,
)
from shrinkmeta.check import GradientCheck, check_meta_gradient
from shrinkmeta.checkpoints import Checkpoints, restore
from shrinkmeta.density import log_joint, log_likelihood, log_predictive, log_prior
from shrinkmeta.evidence import EvidenceInfo, log_evidence, restriction
from shrinkmeta.fit import fit
from shrinkmeta.implicit import Implicit, MetaParams, map_estimate
from shrinkmeta.inner import Inner, InnerInfo
from shrinkmeta.learner import make_learner
from shrinkmeta.likelihood import (
  Likelihood,
  bernoulli,
  categorical,
  gaussian,
  gaussian_with_scale,
  in_precision,
  mean_and_scale,
  poisson,
)
from shrinkmeta.log_det import LogDet
from shrinkmeta.modules import (
  ModuleSummary,
  by_layer,
  by_leaf,
  by_path,
  format_summary,
  module_summary,
)
from shrinkmeta.needs import Estimate, estimate
from shrinkmeta.partition import merge
from shrinkmeta.placement import place_state, place_tasks, share_of_tasks, task_mesh
from shrinkmeta.posterior import Posterior, Predictive, posterior
from shrinkmeta.rows import Row
from shrinkmeta.solvers import SolveInfo
from shrinkmeta.state import MetaLearner, MetaState, Metrics
from shrinkmeta.tasks import Batch, Task, stack_batches, stack_tasks
from shrinkmeta.warm import WarmStart, put, take

__version__ = "0.1.0"

__all__ = (
  "FAMILY",
  "Batch",
  "Calibration",
  "Callback",
  "Checkpoints",
  "Estimate",
  "EvidenceInfo",
  "GradientCheck",
  "Implicit",
  "Inner",
  "InnerInfo",
  "Likelihood",
  "LogDet",
  "MetaLearner",
  "MetaParams",
  "MetaState",
  "Metrics",
  "ModuleSummary",
  "Posterior",
  "Predictive",
  "Row",
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
  "estimate",
  "fine_tuning",
  "fit",
  "fomaml",
  "format_summary",
  "gaussian",
  "gaussian_with_scale",
  "hand_picked",
  "hyperprior",
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
  "over_tasks",
  "place_state",
  "place_tasks",
  "poisson",
  "posterior",
  "progress_bar",
  "put",
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
  "take",
  "task_mesh",
  "tensorboard",
)
