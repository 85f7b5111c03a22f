"""Shrinkage meta-learning: which modules does each task need for itself, how far may they go?"""

from shrinkmeta import hyperprior
from shrinkmeta.algorithms import (
  FAMILY,
  anil,
  boil,
  fine_tuning,
  fomaml,
  hand_picked,
  imaml,
  maml,
  no_adaptation,
  reptile,
  sigma_imaml,
  sigma_maml,
  sigma_reptile,
)
from shrinkmeta.batching import over_tasks
from shrinkmeta.check import GradientCheck, check_meta_gradient
from shrinkmeta.density import log_joint, log_likelihood, log_predictive, log_prior
from shrinkmeta.implicit import Implicit, MetaParams, map_estimate
from shrinkmeta.inner import Inner, InnerInfo
from shrinkmeta.learner import MetaLearner, MetaState, Metrics, Row, make_learner
from shrinkmeta.likelihood import Likelihood, bernoulli, categorical, gaussian, poisson
from shrinkmeta.modules import (
  ModuleSummary,
  by_layer,
  by_leaf,
  by_path,
  format_summary,
  module_summary,
)
from shrinkmeta.partition import merge
from shrinkmeta.solvers import SolveInfo
from shrinkmeta.tasks import Batch, Task, stack_batches, stack_tasks
from shrinkmeta.warm import WarmStart, put, take

__version__ = "0.1.0"

__all__ = (
  "FAMILY",
  "Batch",
  "GradientCheck",
  "Implicit",
  "Inner",
  "InnerInfo",
  "Likelihood",
  "MetaLearner",
  "MetaParams",
  "MetaState",
  "Metrics",
  "ModuleSummary",
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
  "categorical",
  "check_meta_gradient",
  "fine_tuning",
  "fomaml",
  "format_summary",
  "gaussian",
  "hand_picked",
  "hyperprior",
  "imaml",
  "log_joint",
  "log_likelihood",
  "log_predictive",
  "log_prior",
  "make_learner",
  "maml",
  "map_estimate",
  "merge",
  "module_summary",
  "no_adaptation",
  "over_tasks",
  "poisson",
  "put",
  "reptile",
  "sigma_imaml",
  "sigma_maml",
  "sigma_reptile",
  "stack_batches",
  "stack_tasks",
  "take",
)
