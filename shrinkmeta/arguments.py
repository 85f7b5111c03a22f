"""Check settings that many functions take, so that all functions give the same error."""

from collections.abc import Callable, Mapping
from typing import Any

from shrinkmeta.checks import scalars, validate
from shrinkmeta.config import Algorithm, Implicit, Inner, LogDet
from shrinkmeta.devices.batching import check_mesh
from shrinkmeta.model.likelihood import check_likelihood


def check_types(**arguments: Any) -> None:
  """Raise an error unless every argument has the right type for its name.

  Most checks are a single `isinstance`, so they take little time.

  Args:
    **arguments: {name: value}. Every name is `key`, or an argument of `make_learner` with a type
      of its own, such as `inner`.

  Raises:
    TypeError: if an argument has another type. The message says what to write instead.
    ValueError: if `key` holds several keys, or an axis of `mesh` is not of type Auto.

  >>> import optax
  >>> check_types(inner=optax.sgd(0.1))
  Traceback (most recent call last):
  TypeError: inner must be a shrinkmeta.Inner(optimizer, steps, ...); got \
GradientTransformationExtraArgs(init=..., update=...). Wrap it: sm.Inner(optax.sgd(0.1), steps=5).
  """
  for name, value in arguments.items():
    _CHECKS[name](name, value)


def _of_class(kind: type, wanted: str, hint: str) -> Callable[[str, Any], None]:
  """Return a check that an argument is an instance of a class."""
  return lambda name, value: validate.instance(name, value, kind, wanted, hint)


def _function_or_none(wanted: str) -> Callable[[str, Any], None]:
  """Return a check that an argument is a function or None."""

  def check(name: str, value: Any) -> None:
    if value is not None:
      validate.function(name, value, wanted, "See sm.priors.")

  return check


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
  "algorithm": _of_class(
    Algorithm,
    "a shrinkmeta.Algorithm(sigma, phi, gradient)",
    'Take one of the table, such as sm.FAMILY["sigma_imaml"].',
  ),
  "likelihood": check_likelihood,
  "labels": validate.labels,
  "inner": _of_class(
    Inner,
    "a shrinkmeta.Inner(optimizer, steps, ...)",
    "Wrap it: sm.Inner(optax.sgd(0.1), steps=5).",
  ),
  "implicit": _of_class(
    Implicit, "a shrinkmeta.Implicit(curvature, solver, ...)", "Write sm.Implicit()."
  ),
  "log_det": _of_class(LogDet, "a shrinkmeta.LogDet(method, ...)", "Write sm.LogDet()."),
  "phi_optimizer": scalars.optimizer,
  "sigma_optimizer": scalars.optimizer,
  "log_p_phi": _function_or_none("phi -> log p(phi) []"),
  "log_p_sigma": _function_or_none("{module: log sigma_m^2} -> log p(sigma) []"),
  "mesh": lambda name, value: check_mesh(value),
  "key": scalars.key,
}
