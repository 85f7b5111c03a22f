"""The family, one row an algorithm.

| algorithm       | sigma   | phi follows | gradient of theta_hat |
|-----------------|---------|-------------|-----------------------|
| maml            | inf     | l_PLL       | through the steps     |
| fomaml          | inf     | l_PLL       | d theta_hat/d phi = I |
| imaml           | fixed   | l_PLL       | implicit              |
| reptile         | inf     | l_MAP       | none needed           |
| sigma_maml      | learned | l_PLL       | through the steps     |
| sigma_imaml     | learned | l_PLL       | implicit              |
| sigma_reptile   | learned | l_MAP       | implicit, for sigma   |
| meta_sgd        | learned, as step sizes | l_PLL | through the steps |
| empirical_bayes | learned | evidence    | implicit; sigma follows the evidence |
| hand_picked     | mask    | l_PLL       | through the steps     |
| anil, boil      | mask    | l_PLL       | through the steps     |
| fine_tuning     | inf     | pooled data | none: no adaptation in training |
| no_adaptation   | mask    | pooled data | none: nothing moves   |

A mask is sigma = inf for the modules that move and 0 for the others. All share the keywords of
`make_learner`; a keyword appears where it applies.
"""

from collections.abc import Sequence
from typing import Any

import optax
from absl import logging

from shrinkmeta.base import MetaLearner
from shrinkmeta.gradients.implicit import Implicit
from shrinkmeta.gradients.per_task import Algorithm
from shrinkmeta.learner import make_learner
from shrinkmeta.mode.optimise import Inner
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood

FAMILY: dict[str, Algorithm] = {
  "maml": Algorithm("inf", "predictive", "unrolled"),
  "fomaml": Algorithm("inf", "predictive", "first_order"),
  "imaml": Algorithm("fixed", "predictive", "implicit"),
  "reptile": Algorithm("inf", "map", "none"),
  "sigma_maml": Algorithm("learned", "predictive", "unrolled"),
  "sigma_imaml": Algorithm("learned", "predictive", "implicit"),
  "sigma_reptile": Algorithm("learned", "map", "implicit"),
  "meta_sgd": Algorithm("learned", "predictive", "unrolled", prior=False),
  "empirical_bayes": Algorithm("learned", "evidence", "implicit"),
  "hand_picked": Algorithm("inf", "predictive", "unrolled"),
  "anil": Algorithm("inf", "predictive", "unrolled"),
  "boil": Algorithm("inf", "predictive", "unrolled"),
  "fine_tuning": Algorithm("inf", "pooled", "none"),
  "no_adaptation": Algorithm("inf", "pooled", "none"),
}

# One step size for the objective per example, in theta (sigma = inf) or in z.
_STEPS = Inner(optax.sgd(0.1), steps=5)
_UNIT_STEPS = Inner(optax.sgd(1.0), steps=5)  # of sigma^2 each
_LONG = Inner(optax.sgd(0.1), steps=50)
_MODE = Inner(optax.lbfgs(), steps=50, tol=1e-4)
_IMPLICIT = Implicit()
_PHI = optax.adam(1e-3)
_SIGMA = optax.adam(3e-2)
_INIT_SIGMA = 0.3


def _mask(labels: modules.Labels, task_specific: Sequence[str]) -> dict[str, float]:
  known = modules.names(labels)
  if isinstance(task_specific, str):
    raise ValueError(f"task_specific is a sequence of modules; got the string {task_specific!r}.")
  for name in task_specific:
    if name not in known:
      raise ValueError(f"{name!r} is no module; the modules are {known}.")
  return {name: float("inf") if name in task_specific else 0.0 for name in known}


def _head(name: str, labels: modules.Labels) -> str:
  """The module called "head"; else the last by path, in some networks the output layer."""
  known = modules.names(labels)
  if "head" in known:
    return "head"
  logging.warning(
    "%s takes %r for the head, the last module by path: if it is another, say head=...",
    name,
    known[-1],
  )
  return known[-1]


def _without_sigma(
  row: Algorithm,
  likelihood: Likelihood,
  labels: modules.Labels,
  inner: Inner,
  phi_optimizer: optax.GradientTransformation,
  mask: float | dict[str, float] = float("inf"),
  **keywords: Any,
) -> MetaLearner:
  """`mask` belongs to the row: init_sigma among the keywords is an error, sigma is no choice."""
  return make_learner(
    row,
    likelihood,
    labels,
    inner=inner,
    implicit=_IMPLICIT,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=optax.set_to_zero(),
    init_sigma=mask,
    **keywords,
  )


def _with_sigma(
  name: str,
  likelihood: Likelihood,
  labels: modules.Labels,
  inner: Inner,
  implicit: Implicit,
  phi_optimizer: optax.GradientTransformation,
  sigma_optimizer: optax.GradientTransformation,
  init_sigma: float | dict[str, float],
  **keywords: Any,
) -> MetaLearner:
  return make_learner(
    FAMILY[name],
    likelihood,
    labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    **keywords,
  )


def maml(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _STEPS,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """Model-agnostic meta-learning: the validation loss after L steps, differentiated through them.

  References: Finn, Abbeel, Levine, arXiv 1703.03400.
  """
  return _without_sigma(FAMILY["maml"], likelihood, labels, inner, phi_optimizer, **keywords)


def fomaml(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _STEPS,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """First-order MAML: the validation gradient at theta_hat, taken as phi's.

  References: Finn, Abbeel, Levine, arXiv 1703.03400, section 5.2.
  """
  return _without_sigma(FAMILY["fomaml"], likelihood, labels, inner, phi_optimizer, **keywords)


def reptile(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _LONG,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """Reptile: phi moves along the mean over tasks of theta_hat - phi.

  References: Nichol, Achiam, Schulman, arXiv 1803.02999.
  """
  return _without_sigma(FAMILY["reptile"], likelihood, labels, inner, phi_optimizer, **keywords)


def imaml(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _MODE,
  implicit: Implicit = _IMPLICIT,
  phi_optimizer: optax.GradientTransformation = _PHI,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """Implicit MAML: one fixed sigma, init_sigma^2 = 1 / lambda.

  References: Rajeswaran, Finn, Kakade, Levine, arXiv 1909.04630.
  """
  parts = likelihood, labels, inner, implicit, phi_optimizer, optax.set_to_zero(), init_sigma
  return _with_sigma("imaml", *parts, **keywords)


def sigma_maml(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _STEPS,
  phi_optimizer: optax.GradientTransformation = _PHI,
  sigma_optimizer: optax.GradientTransformation = _SIGMA,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """MAML in z with sigma learned: L steps on the log joint, differentiated through them.

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  parts = likelihood, labels, inner, _IMPLICIT, phi_optimizer, sigma_optimizer, init_sigma
  return _with_sigma("sigma_maml", *parts, **keywords)


def sigma_imaml(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _MODE,
  implicit: Implicit = _IMPLICIT,
  phi_optimizer: optax.GradientTransformation = _PHI,
  sigma_optimizer: optax.GradientTransformation = _SIGMA,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """phi and sigma both from the validation likelihood, implicitly through the posterior mode.

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  parts = likelihood, labels, inner, implicit, phi_optimizer, sigma_optimizer, init_sigma
  return _with_sigma("sigma_imaml", *parts, **keywords)


def sigma_reptile(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _MODE,
  implicit: Implicit = _IMPLICIT,
  phi_optimizer: optax.GradientTransformation = _PHI,
  sigma_optimizer: optax.GradientTransformation = _SIGMA,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """phi from the training joint (l_MAP), sigma from the validation likelihood.

  `sigma_gradient` says how much of the procedure sigma's gradient goes through: "joint", theta_hat
  and phi_hat, by one solve over all tasks; "per_task", the default, theta_hat with phi held;
  "diagonal", that without the curvature of the loss. On sinusoids with a network, phi at its
  optimum (experiments/benchmarks, --study=sigma_gradient):

  |          | cosine to joint | norm / joint | signs right | seconds |
  |----------|-----------------|--------------|-------------|---------|
  | joint    | 1               | 1            | 3 of 3      | 0.43    |
  | per_task | 0.86            | 1.8          | 2 of 3      | 0.030   |
  | diagonal | 0.94            | 2.9          | 1 of 3      | 0.025   |

  "joint" is the derivative of the whole only where phi has reached its optimum for this sigma.

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  parts = likelihood, labels, inner, implicit, phi_optimizer, sigma_optimizer, init_sigma
  return _with_sigma("sigma_reptile", *parts, **keywords)


def meta_sgd(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _UNIT_STEPS,
  phi_optimizer: optax.GradientTransformation = _PHI,
  sigma_optimizer: optax.GradientTransformation = _SIGMA,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """MAML with a learned step size for every module, sigma_m^2 times the rate of `inner`.

  sigma_maml without the prior: nothing pulls theta back to phi, so that what keeps it from
  overfitting is the number of steps. With plain gradient descent only is sigma^2 a step size:
  Adam takes steps of sigma.

  References: Li, Zhou, Chen, Li, Meta-SGD, arXiv 1707.09835, there for every parameter; Antoniou,
    Edwards, Storkey, How to train your MAML, arXiv 1810.09502, by layer (and by step).
  """
  parts = likelihood, labels, inner, _IMPLICIT, phi_optimizer, sigma_optimizer, init_sigma
  return _with_sigma("meta_sgd", *parts, **keywords)


def empirical_bayes(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _MODE,
  implicit: Implicit = _IMPLICIT,
  phi_optimizer: optax.GradientTransformation = _PHI,
  sigma_optimizer: optax.GradientTransformation = _SIGMA,
  init_sigma: float | dict[str, float] = _INIT_SIGMA,
  **keywords: Any,
) -> MetaLearner:
  """phi and sigma both from the evidence of the training data; Task.val may be None.

  Exact for linear-Gaussian models, Laplace's approximation otherwise: see `evidence.py`. Parameters
  of the likelihood, such as the scale of `sm.gaussian_with_scale`, are modules with init_sigma 0.
  Its own keywords: `log_det`, how the log-determinant is found (a stochastic one needs the key of
  `update`), and `restricted`, modules of phi to integrate out as well (REML).

  References: MacKay, A practical Bayesian framework for backpropagation networks, 1992; Lindley,
    Smith, Bayes estimates for the linear model, 1972.
  """
  parts = likelihood, labels, inner, implicit, phi_optimizer, sigma_optimizer, init_sigma
  return _with_sigma("empirical_bayes", *parts, **keywords)


def hand_picked(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  task_specific: Sequence[str],
  inner: Inner = _STEPS,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """MAML in which only the modules `task_specific` move."""
  mask = _mask(labels, task_specific)
  row = FAMILY["hand_picked"]
  return _without_sigma(row, likelihood, labels, inner, phi_optimizer, mask=mask, **keywords)


def anil(
  likelihood: Likelihood, labels: modules.Labels, *, head: str | None = None, **keywords: Any
) -> MetaLearner:
  """Almost no inner loop: only the head moves.

  Args:
    head: the module of the output layer. None is the one called "head", and where there is none the
      last by path, which the log tells.

  References: Raghu, Raghu, Bengio, Vinyals, arXiv 1909.09157.
  """
  head = _head("anil", labels) if head is None else head
  return hand_picked(likelihood, labels, task_specific=(head,), **keywords)


def boil(
  likelihood: Likelihood, labels: modules.Labels, *, head: str | None = None, **keywords: Any
) -> MetaLearner:
  """Body only update: all but the head move.

  Args:
    head: the module of the output layer. None is the one called "head", and where there is none the
      last by path, which the log tells.

  References: Oh, Yoo, Kim, Yun, arXiv 2008.08882.
  """
  head = _head("boil", labels) if head is None else head
  _mask(labels, (head,))
  body = [name for name in modules.names(labels) if name != head]
  return hand_picked(likelihood, labels, task_specific=body, **keywords)


def fine_tuning(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner = _LONG,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """phi fits all tasks' data alike; a new task starts there and moves everything."""
  return _without_sigma(FAMILY["fine_tuning"], likelihood, labels, inner, phi_optimizer, **keywords)


def no_adaptation(
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  phi_optimizer: optax.GradientTransformation = _PHI,
  **keywords: Any,
) -> MetaLearner:
  """phi fits all tasks' data alike and is used as it is: every module frozen."""
  row, mask = FAMILY["no_adaptation"], _mask(labels, ())
  return _without_sigma(row, likelihood, labels, _STEPS, phi_optimizer, mask=mask, **keywords)
