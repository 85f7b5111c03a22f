"""The public names and the order of their arguments."""

import inspect

import pytest

import shrinkmeta as sm
from shrinkmeta import public

ARGUMENTS = {
  "Batch": "inputs targets mask",
  "Task": "train val",
  "Likelihood": "predict log_prob",
  "gaussian": "predict scale",
  "categorical": "predict",
  "bernoulli": "predict",
  "poisson": "predict",
  "by_layer": "params",
  "by_leaf": "params",
  "by_path": "params rules",
  "log_prior": "theta phi log_sigma2 labels",
  "log_likelihood": "likelihood theta batch",
  "log_joint": "likelihood labels phi thetas log_sigma2 batches log_p_phi",
  "log_predictive": "likelihood thetas batches",
  "map_estimate": "likelihood labels phi log_sigma2 batch inner implicit *",
  "MetaLearner": "init update adapt meta_gradient",
  "MetaState": "phi log_sigma2 opt_state step",
  "MetaParams": "phi log_sigma2",
  "Inner": "optimizer steps",
  "Implicit": "curvature solver max_steps tol damping",
  "check_meta_gradient": "learner state tasks *",
  "choose_modules": "learner state tasks *",
  "clip_tasks": "learner norm",
  "evaluate": "learner state tasks *",
  "deltas": "learner state thetas ids",
  "save_deltas": "folder deltas *",
  "load_deltas": "folder state ids",
  "predict_tasks": "likelihood state deltas index inputs",
  "posterior": "likelihood labels phi log_sigma2 theta batch *",
  "log_evidence": "likelihood labels phi log_sigma2 batch inner implicit log_det *",
}
ALGORITHMS = {
  "maml": "inner phi_optimizer",
  "fomaml": "inner phi_optimizer",
  "imaml": "inner implicit phi_optimizer init_sigma",
  "reptile": "inner phi_optimizer",
  "meta_sgd": "inner phi_optimizer sigma_optimizer init_sigma",
  "sigma_maml": "inner phi_optimizer sigma_optimizer init_sigma",
  "sigma_imaml": "inner implicit phi_optimizer sigma_optimizer init_sigma",
  "sigma_reptile": "inner implicit phi_optimizer sigma_optimizer init_sigma",
  "empirical_bayes": "inner implicit phi_optimizer sigma_optimizer init_sigma",
  "anil": "",
  "boil": "",
}


def arguments(f):
  """Names, with "*" where the keyword-only ones begin."""
  found = []
  for p in inspect.signature(f).parameters.values():
    if p.kind is p.KEYWORD_ONLY and "*" not in found:
      found.append("*")
    found.append(p.name)
  return found


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
  want = ARGUMENTS[name].split()
  assert arguments(getattr(sm, name))[: len(want)] == want


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name):
  got = arguments(getattr(sm, name))
  assert got[:3] == ["likelihood", "labels", "*"]
  assert set(ALGORITHMS[name].split()) <= set(got[3:])
  parameters = inspect.signature(getattr(sm, name)).parameters.values()
  assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_learner_arguments():
  labels = {"w": "w"}
  learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), labels)
  assert arguments(learner.init) == ["params", "constants"]
  assert arguments(learner.update)[:2] == ["state", "tasks"]
  assert arguments(learner.meta_gradient)[:2] == ["state", "tasks"]
  assert arguments(learner.adapt)[:3] == ["state", "batch", "steps"]


def test_all_lists_what_is_there():
  assert len(set(sm.__all__)) == len(sm.__all__)
  assert {name for name in vars(public) if name[0] != "_"} == set(sm.__all__)
  assert all(getattr(sm, name) is getattr(public, name) for name in sm.__all__)
  assert {*sm.__all__, "mixed"} <= set(dir(sm))
  with pytest.raises(AttributeError, match="module 'shrinkmeta' has no attribute 'by_lyer'"):
    _ = sm.by_lyer
  assert set(ARGUMENTS) | set(ALGORITHMS) <= set(sm.__all__)
  undocumented = [n for n in sm.__all__ if n != "FAMILY" and not getattr(sm, n).__doc__]
  assert not undocumented


@pytest.mark.parametrize("make", [sm.maml, sm.fomaml, sm.reptile, sm.fine_tuning, sm.anil])
def test_rows_without_sigma_refuse_one(make):
  with pytest.raises(TypeError, match="init_sigma"):
    make(sm.gaussian(lambda theta, x: x @ theta["w"]), {"w": "w"}, init_sigma=0.1)


def test_the_family_is_all_learners():
  made = {name for name in sm.__all__ if _returns_a_learner(getattr(sm, name))}
  assert set(sm.FAMILY) == made - {"make_learner"}  # which takes a row


def _returns_a_learner(value):
  annotations = getattr(value, "__annotations__", {})
  return annotations.get("return") is sm.MetaLearner and "likelihood" in annotations
