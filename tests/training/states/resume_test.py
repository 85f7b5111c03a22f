"""What a run says when it continues: the step, the devices, and settings that have changed."""

import pathlib

import optax

import shrinkmeta as sm
from shrinkmeta.training.states import damage, resume

LIKELIHOOD = sm.gaussian(lambda p, x: x * p["w"], 1.0)


def learner_of(steps=5, rate=0.1):
  return sm.sigma_imaml(LIKELIHOOD, {"w": "w"}, inner=sm.Inner(optax.sgd(rate), steps))


def test_the_line_names_the_step_and_the_devices():

  def line(about, step=30, steps: int | None = 60):
    return resume.resume_line(pathlib.Path("runs/a"), about, learner_of(), step, steps)

  begin = "Training continues from step 30 of 60, with the state in runs/a"
  assert line({"devices": 4}) == f"{begin}; saved on 4 devices, now on 1."
  assert line({"devices": 1}) == f"{begin}; on 1 device, as before."
  assert line({}) == f"{begin}."  # an older checkpoint
  assert "step 30, with" in line({}, steps=None)
  assert line({"devices": 4}, 60).startswith("Nothing is left to do: all 60 updates are done.")


def test_changed_settings_are_named_and_allowed():
  about = {"run": resume.run_settings(learner_of())}
  assert resume.changed_settings(about, learner_of()) == []
  assert resume.changed_settings(about, learner_of(steps=3)) == ["Inner.steps was 5 and is now 3"]
  assert resume.changed_settings({}, learner_of(steps=3)) == []  # an older checkpoint
  longer = about["run"] | {"Inner": about["run"]["Inner"] | {"gone": 1}, "Other": {"x": 1}}
  assert resume.changed_settings({"run": longer}, learner_of()) == []  # a newer one


def test_a_changed_objective_is_named():
  def changes(old, new):
    return resume.changed_settings({"run": resume.run_settings(old)}, new)

  labels, map_ = {"w": "w"}, sm.sigma_reptile
  prior = sm.priors.half_cauchy(1.0)
  assert changes(map_(LIKELIHOOD, labels), map_(LIKELIHOOD, labels, sigma_gradient="joint")) == [
    "learner.sigma_gradient was 'per_task' and is now 'joint'"
  ]
  assert changes(map_(LIKELIHOOD, labels, log_p_sigma=prior), map_(LIKELIHOOD, labels)) == [
    "learner.log_p_sigma was 'given' and is now 'absent'"
  ]
  maml = sm.maml(LIKELIHOOD, labels)
  assert changes(maml, sm.clip_tasks(maml, 0.1)) == ["learner.clip_tasks was None and is now 0.1"]
  evidence = lambda **how: sm.empirical_bayes(LIKELIHOOD, labels, log_det=sm.LogDet(**how))
  assert changes(evidence(), evidence(method="lanczos", probes=8)) == [
    "LogDet.method was 'auto' and is now 'lanczos'",
    "LogDet.probes was 16 and is now 8",
  ]
  older = resume.run_settings(evidence())
  del older["LogDet"], older["learner"]
  assert resume.changed_settings({"run": older}, evidence(method="exact")) == []


def test_long_errors_are_cut():
  long = 'Error reading "d/1": no such file [tensorstore_spec[1]=\'{"a": 1}\']\nmore'
  assert damage.in_short(ValueError(long)) == 'Error reading "d/1": no such file'
  assert damage.in_short(ValueError("x" * 2000)) == "x" * 300 + " ..."
  assert damage.in_short(ValueError()) == ""
