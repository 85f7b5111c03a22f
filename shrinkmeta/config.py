"""The settings of a learner, which are part of its compiled program, and their checks."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.optimisers import differentiable, needs, warn_if_endless
from shrinkmeta.devices.batching import Batching, check_batching
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.quasi_newton import lbfgs

PyTree = Any
Frozen = frozenset[str]  # names of modules that stay at phi
Curvature = Literal["gauss_newton", "hessian"]
SigmaGradient = Literal["joint", "per_task", "diagonal"]


class Algorithm(NamedTuple):
  """One line of the table of algorithms: how it finds sigma, phi and theta_hat.

  Attributes:
    sigma: "inf": no prior; sigma is inf in task-specific modules and 0 in frozen modules.
      "fixed": sigma stays at init_sigma. "learned": sigma follows a gradient.
    phi: the objective of phi's updates. "predictive": l_PLL, the log-likelihood of the validation
      examples at theta_hat. "map": l_MAP, the log joint of theta_hat and the training examples.
      "evidence": the log evidence of the training examples; a learned sigma follows it too.
      "pooled": the log-likelihood of all examples at theta = phi, without adaptation.
    gradient: how theta_hat is differentiated. "unrolled": through the inner steps. "first_order":
      as if d theta_hat / d phi = I. "implicit": by the implicit function theorem. "none": never.
    prior: False drops the prior, so that a finite sigma^2 is only a step size.
  """

  sigma: Literal["inf", "fixed", "learned"]
  phi: Literal["predictive", "map", "evidence", "pooled"]
  gradient: Literal["unrolled", "first_order", "implicit", "none"]
  prior: bool = True


# Frozen classes store plain Python numbers with this: NumPy's numbers would change dtypes.
_set = object.__setattr__


@dataclasses.dataclass(frozen=True)
class Inner:
  """How theta_hat of one task is found: by minimising J / N, the negative log joint per example.

  Attributes:
    optimizer: any optax optimiser; `sm.lbfgs()` by default. It moves z for finite sigma (theta =
      phi + sigma z), and theta for sigma = inf. Schedules count inner steps. `value`, `grad` and
      `value_fn` are passed to optimisers that want them (L-BFGS, Polyak step sizes).
    steps: the number of steps; if `tol` is given, the largest number.
    tol: stop once the norm of grad J / N is at most this, in nats per example. None runs all steps.
      A loop that may stop early can be differentiated in forward mode and implicitly, but not
      backwards through its steps. With `batch_size` all steps are run, because the gradient of one
      mini-batch says too little about J.
    batch_size: None uses all examples. A number draws that many examples in every step, without
      replacement, with a key that the caller passes. Use a decreasing step size: the gradient of a
      mini-batch is not 0 at the mode, so with a constant step size theta never comes to rest.
    remat: recompute each step in a backward pass through the steps instead of storing it.

  >>> Inner(optax.sgd(0.1), steps=5).steps
  5
  """

  optimizer: optax.GradientTransformation = dataclasses.field(default_factory=lbfgs)
  steps: int = 100
  tol: float | None = None
  batch_size: int | None = None
  remat: bool = False

  def __post_init__(self) -> None:
    scalars.optimizer("Inner.optimizer", self.optimizer)
    _set(self, "steps", validate.integer("Inner.steps", self.steps, least=0))
    if self.tol is not None:
      _set(self, "tol", scalars.number("Inner.tol", self.tol))
      if not self.tol > 0:
        raise ValueError(f"Inner.tol must be positive, or None to run all steps; got {self.tol}.")
    if self.batch_size is not None:
      _set(self, "batch_size", validate.integer("Inner.batch_size", self.batch_size, least=1))
    _set(self, "remat", scalars.flag("Inner.remat", self.remat))


@dataclasses.dataclass(frozen=True)
class Implicit:
  """How the implicit gradient is computed.

      K w = s g,   d/d phi = g - C (s w),   d/d log sigma_m^2 = <w, z> over module m

  K = P + s C s, where s is sigma_m in module m, and P is 1, or 0 without a prior. C is the
  curvature of -log p(D | theta), g the gradient of the loss, both at theta_hat = phi + s z.

  Attributes:
    curvature: "gauss_newton", positive semi-definite, or "hessian", exact and possibly indefinite.
    solver: how K w = s g is solved. "cg": conjugate gradients. "dual": exactly, by the singular
      values of A [R, D] (see LogDet), with min(R, D) derivatives of the network; Gauss-Newton only.
      CG mostly needs fewer products. "neumann": a Neumann series. "identity": w = s g, d/d phi = g.
    max_steps: the largest number of CG or Neumann iterations.
    tol: the relative residual |K w - s g| / |s g| at which the iterations stop. A solve that
      reaches it counts as converged.
    damping: a number added to the diagonal of K, which biases the gradient. As it grows, d/d phi
      tends to g and d/d log sigma^2 to 0.
    batch_size: None computes the curvature from all examples. A number computes it from
      `num_batches` mini-batches of that size, drawn for each solve with a key that the caller
      passes, and scales it to all N. A batch norm then sees one mini-batch at a time.
    num_batches: the number of these mini-batches. None takes all examples. With 1 the cost does not
      grow with N. The noise of the draw averages out over tasks. A bias remains: w = s g along
      directions that no drawn example determines. With more than 1, each product linearises one
      mini-batch after another. This takes the memory of one mini-batch, and 1.5 times the work of
      a product with a stored linearisation.

  >>> Implicit(solver="dual").max_steps
  30
  """

  curvature: Curvature = "gauss_newton"
  solver: Literal["cg", "dual", "neumann", "identity"] = "cg"
  max_steps: int = 30
  tol: float = 1e-4
  damping: float = 0.0
  batch_size: int | None = None
  num_batches: int | None = 1

  def __post_init__(self) -> None:
    if self.curvature not in ("gauss_newton", "hessian"):
      raise ValueError(f'curvature must be "gauss_newton" or "hessian"; got {self.curvature!r}.')
    if self.solver not in ("cg", "dual", "neumann", "identity"):
      raise ValueError(
        f'solver must be "cg", "dual", "neumann" or "identity"; got {self.solver!r}.'
      )
    if self.solver == "dual" and self.curvature == "hessian":
      raise ValueError(
        'solver="dual" factorises J^T Lambda J: use curvature="gauss_newton" or solver="cg".'
      )
    for name in ("tol", "damping"):
      _set(self, name, scalars.number(f"Implicit.{name}", getattr(self, name)))
      if not getattr(self, name) >= 0:
        raise ValueError(f"Implicit.{name} must not be negative; got {getattr(self, name)}.")
    for name in ("max_steps", "batch_size", "num_batches"):
      if name == "max_steps" or getattr(self, name) is not None:
        _set(self, name, validate.integer(f"Implicit.{name}", getattr(self, name), least=1))
    if self.batch_size is not None and self.solver == "identity":
      raise ValueError('solver="identity" takes no curvature: leave Implicit.batch_size None.')
    if self.num_batches != 1 and (self.batch_size is None or self.solver == "dual"):
      raise ValueError(
        f"Implicit.num_batches is {self.num_batches}: it goes with a batch_size, and with the "
        f'solvers "cg" and "neumann"; got batch_size={self.batch_size} and solver={self.solver!r}.'
      )


@dataclasses.dataclass(frozen=True)
class LogDet:
  """How log det K, K = I + s C s, is computed.

  s C s = A^T A. A [R, D] has a row for each output of each example, and a column for each of the D
  task-specific parameters.

  Attributes:
    method: "exact": by the singular values of A. "lanczos": an estimate from random vectors, with a
      standard error; the caller then passes a key. "auto": exact if A has at most `limit` entries.
    limit: the largest number R D of entries of A for which "auto" is exact. The work of the exact
      method grows as min(R, D) R D.
    probes: the number of random vectors of "lanczos". The standard error falls as 1 / sqrt(probes).
      It leaves out rounding, up to D times the largest eigenvalue of K times the float precision.
    steps: products with K for each random vector v. R + 1 give v^T log(K) v up to rounding.

  >>> LogDet("lanczos", probes=8).probes
  8
  """

  method: Literal["auto", "exact", "lanczos"] = "auto"
  limit: int = 2**24
  probes: int = 16
  steps: int = 32

  def __post_init__(self) -> None:
    if self.method not in ("auto", "exact", "lanczos"):
      raise ValueError(f'method must be "auto", "exact" or "lanczos"; got {self.method!r}.')
    for name, least in (("limit", 1), ("probes", 2), ("steps", 1)):  # one probe has no spread
      _set(self, name, validate.integer(f"LogDet.{name}", getattr(self, name), least))


class Spec(NamedTuple):
  """The settings of a learner, and the values that `derive` computes from them."""

  algorithm: Algorithm
  likelihood: Likelihood
  labels: modules.Labels
  inner: Inner
  implicit: Implicit
  phi_optimizer: optax.GradientTransformation
  sigma_optimizer: optax.GradientTransformation
  sigma: dict[str, float]  # {module: sigma_m} at the start
  log_det: LogDet
  restricted: tuple[str, ...]
  sigma_gradient: SigmaGradient
  log_p_phi: Callable[[PyTree], jax.Array] | None
  log_p_sigma: Callable[[Mapping[str, jax.typing.ArrayLike]], jax.Array] | None
  batching: Batching
  mesh: Mesh | None
  clip: float | None = None  # the largest norm of the gradient of one task: see sm.clip_tasks
  log_sigma2: dict[str, float] = {}  # {module: log sigma_m^2} at the start; -inf: frozen, inf: free
  frozen: Frozen = frozenset()  # modules that start at sigma = 0 and stay at phi for good
  free: Frozen = frozenset()  # modules with sigma = inf for good, known before compilation
  built: dict[str, float] = {}  # {module: 0 or inf}: the sigma that compiled programs rely on
  has_mode: bool = False  # theta_hat is a stationary point, differentiated implicitly
  needs_validation: bool = True  # False for Reptile and the evidence
  programs: dict[Any, Any] = {}  # see `kept`

  @property
  def sees_all_tasks(self) -> bool:
    """Whether the meta-loss needs all tasks of an update at once. This excludes micro-batches."""
    return self.sigma_gradient == "joint" or bool(self.restricted)


def derive(spec: Spec) -> Spec:
  """Check that the settings fit each other, and fill in the fields that follow from them.

  If every module is frozen, `frozen` is empty: the inner problem needs at least one parameter, and
  sigma = 0 already keeps it at phi. Raise ValueError if one setting contradicts another.
  """
  sigma, (of_sigma, phi, gradient, _) = spec.sigma, spec.algorithm
  frozen = frozenset(m for m, s in sigma.items() if s == 0)
  frozen = frozen if len(frozen) < len(sigma) else frozenset()
  spec = spec._replace(
    log_sigma2={m: 2.0 * math.log(s) if s else -math.inf for m, s in sigma.items()},
    frozen=frozen,
    built={m: s for m, s in sigma.items() if m in frozen or of_sigma == "inf"},
    free=frozenset(m for m, s in sigma.items() if of_sigma == "inf" and s == math.inf),
    has_mode=gradient == "implicit",
    needs_validation=not (phi == "evidence" or (phi, gradient) == ("map", "none")),
  )
  check_spec(spec)
  return spec


def check_spec(spec: Spec) -> None:
  """Raise ValueError if one setting contradicts another."""
  algorithm, sigma = spec.algorithm, spec.sigma
  check_algorithm(algorithm)
  check_batching(spec.batching)
  check_sigma_gradient(spec)
  check_optimisers(spec)
  learned, evidence = algorithm.sigma == "learned", algorithm.phi == "evidence"
  if algorithm.gradient == "unrolled" and spec.inner.tol is not None:
    raise ValueError(
      "A gradient through the inner steps needs a fixed number of steps: set Inner.tol=None, or "
      "take an algorithm with an implicit gradient, such as sm.sigma_imaml."
    )
  for name, given in (("restricted", spec.restricted), ("log_det", spec.log_det != LogDet())):
    if given and not evidence:
      raise ValueError(f"{name} belongs to empirical_bayes, which follows the evidence.")
  if not set(spec.restricted) <= set(sigma):
    raise ValueError(f"restricted is a tuple of {tuple(sigma)}; got {spec.restricted!r}.")
  if spec.log_p_sigma is not None and not learned:
    raise ValueError("log_p_sigma is for algorithms that learn sigma; this one has a fixed sigma.")
  if algorithm.sigma == "inf" and not set(sigma.values()) <= {0.0, math.inf}:
    raise ValueError(f'init_sigma must be 0 or inf if Algorithm.sigma is "inf"; got {sigma}.')
  if evidence and math.inf in sigma.values():
    raise ValueError("init_sigma must be finite: the evidence needs a prior on theta.")
  if evidence or spec.sigma_gradient == "joint":
    check_whole(spec.implicit)
  if spec.has_mode:
    check_dual(spec.implicit, spec.log_sigma2)


def check_optimisers(spec: Spec) -> None:
  """Raise ValueError if an optimiser needs a value that the learner does not give it."""
  zeros = lambda module: None if module in spec.frozen else jnp.zeros((2, 2))
  moving = jax.tree.map(zeros, spec.labels)
  if spec.algorithm.gradient == "unrolled" and not differentiable(spec.inner.optimizer, moving):
    raise ValueError(
      "This algorithm differentiates through the inner steps, and JAX cannot differentiate through "
      "the line search of this Inner.optimizer (L-BFGS is the default of Inner): take "
      "Inner(optax.sgd(0.1), steps=...), or an algorithm with an implicit gradient."
    )
  warn_if_endless(spec.inner.optimizer, moving)
  phi = jax.tree.map(lambda _: jnp.zeros((2, 2)), spec.labels)
  sigma = {module: jnp.zeros([]) for module in spec.sigma}
  no_loss = spec.algorithm[1:3] == ("map", "none")
  for name, tree in (("phi_optimizer", phi), ("sigma_optimizer", sigma)):
    wanted = needs(getattr(spec, name), tree)
    if "value_fn" in wanted:
      raise ValueError(
        f"{name} has a line search, which needs the loss at several points. An update computes it "
        "at one: take optax.adam(1e-3), or optax.lbfgs(1e-2, linesearch=None)."
      )
    if wanted and no_loss:
      raise ValueError(
        f"{name} needs the loss, but reptile computes no loss: take an optimiser that needs only "
        "gradients, such as optax.adam(1e-3)."
      )


_GRADIENTS = {
  "predictive": ("unrolled", "first_order", "implicit"),
  "map": ("implicit", "none"),
  "evidence": ("implicit",),
  "pooled": ("none",),
}


def check_algorithm(algorithm: Algorithm) -> None:
  """Raise ValueError unless the four settings form one of the supported combinations."""
  sigma, phi, gradient, prior = algorithm
  fits = sigma in ("inf", "fixed", "learned") and gradient in _GRADIENTS.get(phi, ())
  if not fits or (sigma == "learned" and gradient == "none"):
    choices = "; ".join(f"{phi}: {' or '.join(own)}" for phi, own in _GRADIENTS.items())
    raise ValueError(
      f"There is no {algorithm}. sigma must be inf, fixed or learned; learned needs a gradient "
      f"other than none. The gradients for each phi are {choices}. See sm.FAMILY."
    )
  if not prior and gradient not in ("unrolled", "first_order"):
    raise ValueError('prior=False has no mode: gradient must be "unrolled" or "first_order".')


def check_sigma_gradient(spec: Spec) -> None:
  """Raise ValueError if the algorithm does not support this `sigma_gradient`."""
  choice = spec.sigma_gradient
  if choice not in ("joint", "per_task", "diagonal"):
    raise ValueError(f'sigma_gradient must be "joint", "per_task" or "diagonal"; got {choice!r}.')
  if choice != "per_task" and spec.algorithm != Algorithm("learned", "map", "implicit"):
    raise ValueError(f"sigma_gradient={choice!r} is for sigma_reptile, in which phi follows l_MAP.")
  if choice == "joint" and spec.implicit.solver != "cg":
    raise ValueError(
      f'sigma_gradient="joint" needs solver="cg"; implicit.solver is {spec.implicit.solver!r}.'
    )


def check_whole(implicit: Implicit) -> None:
  """Raise ValueError if the curvature is estimated from mini-batches."""
  if implicit.batch_size is not None:
    raise ValueError(
      f'The evidence and sigma_gradient="joint" need the curvature of all examples: leave '
      f"Implicit.batch_size None; it is {implicit.batch_size}."
    )


def check_dual(implicit: Implicit, log_sigma2: Mapping[str, Any]) -> None:
  """Raise ValueError if the solver is "dual" and a sigma is known to be inf."""
  if implicit.solver == "dual":
    modules.finite_sigma(log_sigma2, 'dual solve: use solver="cg"')
