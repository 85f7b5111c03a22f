"""The settings with which every algorithm starts.

An *arm* is an algorithm with its settings. A comparison compares arms. `config.arms` maps the name
of an algorithm to its arm.
"""

from typing import Any

ARM = {  # setting of an arm -> its meaning
  "inner": "optimiser of theta, or of z where sigma is finite: sgd, adam, lbfgs or smooth_adam",
  "inner_rate": "step size of `inner`",
  "inner_steps": "inner steps of a task in training",
  "inner_decay": "n: the rate is inner_rate / (1 + t / n) after t steps; 0: it is constant",
  "batch_size": "examples of an inner step; 0: all of them",
  "modules": '"layer", or "block", a layer with its norm: what has one sigma, or one rate',
  "trials": "length of the search that chose these settings; 0: no search did",
  "searched_with": "settings of that search which differ from these of the table; empty: none",
  "outer": "optimiser of phi, with the same names as `inner`",
  "outer_rate": "step size of `outer`",
}
OWN = {  # likewise, of some algorithms only
  "init_sigma": "sigma of every module at the start",
  "sigma_rate": "step size of Adam on log sigma^2",
  "task_specific": "the module that hand_picked adapts",
  "clip": "largest norm of the gradient of a task in an update, see sm.clip_tasks; 0: no limit",
  "pooled": "whether training tasks adapt on the examples of both parts, train and val",
}


def _arm(
  inner: str, rate: float, steps: int, outer: str, outer_rate: float, **own: float | str | bool
) -> dict[str, Any]:
  return {
    "inner": inner,
    "inner_rate": rate,
    "inner_steps": steps,
    "inner_decay": 0,
    "batch_size": 0,
    "modules": "layer",
    "trials": 0,
    "searched_with": "",
    "outer": outer,
    "outer_rate": outer_rate,
    **own,
  }


def start() -> dict[str, dict[str, Any]]:
  """Return an arm for every algorithm, for a convolutional network and some hundred meta-steps."""
  predictive = {
    "sigma_imaml": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.3, sigma_rate=6e-2),
    # Steps in theta as long as those of maml. The prior shrinks z by inner_rate / N a step: with a
    # rate as large as the number N of examples, the last gradient alone would be left.
    "sigma_maml": _arm("sgd", 0.5, 5, "adam", 1e-2, init_sigma=1.0, sigma_rate=6e-2),
    "imaml": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.5),
    "fomaml": _arm("sgd", 0.5, 10, "adam", 1e-2),
    "maml": _arm("sgd", 0.5, 5, "adam", 1e-2),
    "anil": _arm("sgd", 0.5, 5, "adam", 1e-2),
    "boil": _arm("sgd", 0.5, 5, "adam", 1e-2),
    "meta_sgd": _arm("sgd", 1.0, 5, "adam", 1e-2, init_sigma=0.7, sigma_rate=6e-2),
    "hand_picked": _arm("sgd", 0.5, 5, "adam", 1e-2, task_specific="conv_3"),
  }
  others = {
    "sigma_reptile": _arm("adam", 0.3, 30, "adam", 1e-2, init_sigma=0.3, sigma_rate=6e-2),
    "reptile": _arm("sgd", 0.5, 30, "sgd", 0.5, pooled=True),
    "fine_tuning": _arm("sgd", 0.5, 30, "adam", 1e-2),
  }
  return {name: arm | {"clip": 0.0} for name, arm in predictive.items()} | others
