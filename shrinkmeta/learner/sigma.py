"""Set the sigma at which a learner starts: from `init_sigma`, or from an earlier state."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.base import MetaState
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.config import Spec, derive
from shrinkmeta.model import modules
from shrinkmeta.model.priors import SigmaPrior


def sigma_by_module(
  init_sigma: float | Mapping[str, float], labels: modules.Labels
) -> dict[str, float]:
  """Return {module: sigma_m at the start}.

  Args:
    init_sigma: a number for all modules, or {module: number}.
    labels: the module of every parameter.

  Raises:
    TypeError: `init_sigma` is neither a number nor a dict of numbers.
    ValueError: a number is negative or NaN, or a module has none.

  >>> sigma_by_module(0.3, {"w": "body", "b": "head"})
  {'head': 0.3, 'body': 0.3}
  """
  if isinstance(init_sigma, Mapping):
    modules.check_modules("init_sigma", init_sigma, labels)
    sigma = {m: scalars.number(f"init_sigma[{m!r}]", value) for m, value in init_sigma.items()}
  else:
    sigma = dict.fromkeys(modules.names(labels), scalars.number("init_sigma", init_sigma))
  for module, value in sigma.items():
    if not value >= 0:
      raise ValueError(f"init_sigma is a standard deviation; got {value} for module {module!r}.")
  return sigma


def keep_modules(spec: Spec, state: MetaState, kept: Sequence[str]) -> tuple[Spec, MetaState]:
  """Return the spec and the state in which all modules but `kept` have sigma = 0.

  The states of both optimisers still fit, because phi and log sigma^2 keep their structure.

  Args:
    spec: the spec of the learner.
    state: a state of this learner whose values are known.
    kept: the modules that stay task-specific, with the sigma that they have in `state`.

  Raises:
    TypeError: `kept` is not a sequence of names, or sigma is not known here.
    ValueError: `kept` is empty, or names a module that does not exist or is frozen.
  """
  sigma = known_sigma(spec, state, "keep")
  check_kept(kept, sigma)
  left = {m: value if m in kept else 0.0 for m, value in sigma.items()}
  log_sigma2 = {
    m: v if m in kept else jnp.where(jnp.isnan(v), v, -jnp.inf)  # on the device of v
    for m, v in state.log_sigma2.items()
  }
  return derive(spec._replace(sigma=left)), state._replace(log_sigma2=log_sigma2)


def finite_or_zero(log_sigma2: Mapping[str, jax.typing.ArrayLike]) -> dict[str, jax.Array]:
  """Return {module: log sigma_m^2}, with 0 where it is infinite: frozen, or without a prior."""
  return {m: jnp.where(jnp.isinf(v), jnp.zeros_like(v), v) for m, v in log_sigma2.items()}


def of_finite(log_p_sigma: SigmaPrior) -> SigmaPrior:
  """Return a prior that sees 0 where log sigma_m^2 is infinite, and has no gradient there."""
  return lambda log_sigma2: log_p_sigma(finite_or_zero(log_sigma2))


def known_sigma(spec: Spec, state: MetaState, what: str) -> dict[str, float]:
  """Return {module: sigma_m in a state}, with 0 for modules that the learner freezes for good.

  Args:
    spec: the spec of the learner.
    state: a state of this learner.
    what: the function that needs sigma, for the error message.

  Raises:
    TypeError: sigma is traced, or another process holds it.
  """
  sigma = {}
  for module in modules.names(spec.labels):
    value = validate.known(state.log_sigma2[module])
    if value is None:
      raise TypeError(
        f"{what} reads sigma, but state.log_sigma2[{module!r}] is not known here. Call it outside "
        "jit, vmap and grad, on a state that this process holds whole."
      )
    held = spec.sigma[module] == 0
    sigma[module] = 0.0 if held else float(np.exp(0.5 * value.astype(np.float64)))
  return sigma


def check_kept(kept: Any, sigma: Mapping[str, float]) -> None:
  """Raise TypeError or ValueError unless `kept` names task-specific modules.

  Args:
    kept: the argument to check.
    sigma: {module: sigma_m}, with 0 for frozen modules.
  """
  wanted = f"a sequence of modules, such as {tuple(sigma)[:1]!r}"
  if isinstance(kept, (str, Mapping)) or not isinstance(kept, (Sequence, set, frozenset)):
    raise TypeError(f"modules must be {wanted}; got {shown(kept)}.")
  for name in kept:
    if not isinstance(name, str):
      raise TypeError(f"modules must be {wanted}; it holds {shown(name)}.")
    if name not in sigma:
      raise ValueError(f"modules has {name!r}, which is no module; they are {tuple(sigma)}.")
    if sigma[name] == 0:
      raise ValueError(
        f"Module {name!r} is frozen in this learner (sigma = 0), so that it cannot stay "
        f"task-specific. Build a learner with init_sigma={{{name!r}: 0.3, ...}} and train it first."
      )
  if not kept:
    raise ValueError(
      "modules is empty: no module would be task-specific. A model without adaptation is "
      "sm.no_adaptation(likelihood, labels)."
    )
