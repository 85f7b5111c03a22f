"""The training loop: resumption, log records, evaluation, errors, signals, memory."""

import concurrent.futures
import faulthandler
import functools
import gc
import importlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.training import programs, stopping
from shrinkmeta.training.records import Warnings
from tests import fit_worker

SOURCE = fit_worker.source


@functools.cache  # tests share the programs of a learner
def make(algorithm="sigma_imaml", width=4, steps=3):
  learner, params = fit_worker.make_learner(algorithm, None, width, steps)
  return learner, learner.init(params)


def run(learner, state, steps, source=SOURCE, **keywords):
  records = []
  keywords = {"meta_batch": 3, "callbacks": [sm.recorder(records)]} | keywords
  return sm.fit(learner, state, source, steps, **keywords), records


def test_fit_is_the_loop_written_out():
  learner, state = make()
  fitted, records = run(learner, state, 4)
  update = jax.jit(learner.update)
  for i in range(4):
    state, metrics = update(state, SOURCE(3 * i, 3))
    np.testing.assert_allclose(records[i]["loss"], metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(records[i]["inner_steps"], metrics.inner.steps.mean(), rtol=1e-6)
    np.testing.assert_allclose(records[i]["solve_steps"], metrics.solve.steps.mean(), rtol=1e-6)
    sigma = math.exp(0.5 * float(state.log_sigma2["layer_1"]))
    np.testing.assert_allclose(records[i]["sigma/layer_1"], sigma, rtol=1e-6)
  # These are two programs and may round differently. Differences of large numbers show it.
  chex.assert_trees_all_close(fitted, state, rtol=1e-5)
  assert [record["step"] for record in records] == [0, 1, 2, 3]


def test_a_mask_in_some_updates_only():
  ones = jnp.ones((2, 4))  # inputs, targets and masks of one shape
  masks = {0: (ones, None), 2: (None, ones), 4: (None, None)}

  def source(first, count):
    return sm.Task(*(sm.Batch(ones, ones, mask) for mask in masks[first]))

  inner = sm.Inner(optax.sgd(0.1), steps=2)
  learner = sm.sigma_imaml(sm.gaussian(lambda t, x: x * t["w"]), {"w": "w"}, inner=inner)
  _, records = run(learner, learner.init({"w": 0.0}), 3, source, meta_batch=2)
  assert [record["step"] for record in records] == [0, 1, 2]


def test_the_state_given_can_be_used_again():
  learner, state = make()
  first, _ = run(learner, state, 2)
  second, _ = run(learner, state, 2)
  chex.assert_trees_all_equal(first, second)


def test_a_module_is_frozen_by_a_number():
  learner, state = make()
  frozen = state._replace(log_sigma2=state.log_sigma2 | {"layer_1": -math.inf})
  fitted, records = run(learner, frozen, 2)
  assert fitted.log_sigma2["layer_1"] == -math.inf and records[1]["sigma/layer_1"] == 0.0


def test_tasks_are_counted_exactly_in_sixteen_bits():
  """bfloat16 cannot represent 257."""
  linear = sm.gaussian(lambda theta, x: x * theta["w"], 1.0)
  learner = sm.reptile(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1))
  one = jnp.ones((257, 2), jnp.bfloat16)
  state = learner.init({"w": jnp.zeros([], jnp.bfloat16)})
  _, records = run(learner, state, 1, lambda first, count: sm.Task(sm.Batch(one, one), None),
                meta_batch=257)  # fmt: skip
  assert records[0]["failed"] == 0.0


def test_micro_batches_add_up_in_sixteen_bits():
  """In bfloat16 256 + 1 is 256; the state and the metrics keep the dtype of the parameters."""
  learner = sm.reptile(
    sm.gaussian(lambda theta, x: x * theta["w"], 1.0),
    {"w": "w"},
    inner=sm.Inner(optax.sgd(0.5), 1),
    phi_optimizer=optax.sgd(1.0),
  )
  one = jnp.ones((512, 1), jnp.bfloat16)
  source = lambda first, count: sm.Task(*[sm.Batch(one[:count], one[:count])] * 2)
  state = learner.init({"w": jnp.zeros([], jnp.bfloat16)})
  for parts in (1, 512):
    new, records = run(learner, state, 1, source, meta_batch=512, micro_batches=parts)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert new.phi["w"] == 0.5 and records[0]["failed"] == 0.0
    loss = 0.125 + 0.5 * math.log(2 * math.pi)  # at theta_hat = 0.5, the target is 1
    np.testing.assert_allclose(records[0]["loss"], loss, rtol=0.02)
  sums, per_task = learner.sums(state, source(0, 512))
  floats = [x.dtype for x in jax.tree.leaves(sums) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floats) == {jnp.dtype(jnp.float32)}
  grad, metrics = learner.meta_gradient(state, source(0, 512))
  assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.bfloat16)}
  means = (metrics.loss, metrics.phi_loss, metrics.mean_inner, metrics.phi_grad_norm)
  assert {x.dtype for x in jax.tree.leaves(means)} == {jnp.dtype(jnp.bfloat16)}


def test_micro_batches_add_up_with_priors_and_failed_tasks():
  """The mean over the tasks that did not fail, with the priors counted once."""
  params = {"w": jnp.zeros(2), "b": jnp.zeros([])}
  keys = jax.random.split(jax.random.key(0), 2)
  x, y = jax.random.normal(keys[0], (6, 8, 2)), jax.random.normal(keys[1], (6, 8))
  y = y.at[1].set(jnp.inf)  # one task fails

  def source(first, count):
    pick = slice(first, first + count)
    batch = lambda half: sm.Batch(x[pick, half], y[pick, half])
    return sm.Task(batch(slice(0, 4)), batch(slice(4, 8)))

  for algorithm in (sm.sigma_imaml, sm.sigma_reptile, sm.empirical_bayes):
    learner = algorithm(
      sm.gaussian(lambda p, x: x @ p["w"] + p["b"], 1.0),
      sm.by_leaf(params),
      log_p_phi=lambda phi: -0.5 * optax.tree.norm(phi, squared=True),
      log_p_sigma=sm.priors.half_cauchy(1.0),
      inner=sm.Inner(optax.sgd(0.1), 20),
      phi_optimizer=optax.sgd(0.1),
      sigma_optimizer=optax.sgd(0.1),
    )
    state = learner.init({"w": jnp.ones(2), "b": jnp.ones([])})
    whole, records = run(learner, state, 1, source, meta_batch=6)
    parts, part_records = run(learner, state, 1, source, meta_batch=6, micro_batches=3)
    chex.assert_trees_all_close(whole, parts, rtol=1e-5)
    assert records[0]["failed"] == part_records[0]["failed"] == 1
    for name in records[0].keys() - {"seconds", "solve_residual", "inner_grad_norm"}:
      np.testing.assert_allclose(records[0][name], part_records[0][name], rtol=1e-5, err_msg=name)


def test_keys_differ_from_task_to_task_also_in_micro_batches():
  """A task's mini-batches depend on its number in the update, not on its micro-batch."""
  learner, params = fit_worker.make_learner("reptile", None, 4)
  inner = sm.Inner(optax.sgd(0.02), steps=3, batch_size=2)
  learner = sm.reptile(learner.spec.likelihood, learner.labels, inner=inner)
  state, key = learner.init(params), jax.random.key(5)
  whole, _ = run(learner, state, 2, meta_batch=4, key=key)
  parts, _ = run(learner, state, 2, meta_batch=4, key=key, micro_batches=2)
  other, _ = run(learner, state, 2, meta_batch=4, key=jax.random.key(6))
  chex.assert_trees_all_close(whole, parts, rtol=1e-5)
  update, loop = jax.jit(learner.update), state
  for step in range(2):
    loop, _ = update(loop, SOURCE(4 * step, 4), jax.random.fold_in(key, step))
  chex.assert_trees_all_close(whole, loop, rtol=1e-5)
  assert not np.allclose(whole.phi["layer_1"]["w"], other.phi["layer_1"]["w"], rtol=1e-4)


def test_a_stopped_run_continues(tmp_path):
  learner, state = make()
  straight, records = run(learner, state, 9)
  keep = sm.Checkpoints(tmp_path / "run", every=2)
  log = tmp_path / "run" / "log.jsonl"
  run(learner, state, 5, checkpoints=keep, callbacks=[sm.json_lines(log)])
  with log.open("a") as file:
    file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "los')  # steps after the last checkpoint
  resumed, _ = run(learner, state, 9, checkpoints=keep, callbacks=[sm.json_lines(log)])
  chex.assert_trees_all_equal(straight, resumed)
  timeless = lambda record: {k: v for k, v in record.items() if k != "seconds"}
  assert list(map(timeless, sm.read_json_lines(log))) == list(map(timeless, records))
  again, records = run(learner, state, 9, checkpoints=keep)
  assert records == []
  chex.assert_trees_all_equal(again, straight)


def test_the_best_evaluated_state_is_kept(tmp_path):
  learner, state = make()
  values, saved = iter([math.nan, 3.0, 1.0, 2.0]), []

  def evaluate(state):
    saved.append(sorted(name for name in os.listdir(tmp_path) if name.isdigit()))
    return {"nll": next(values)}

  keywords = {
    "evaluate": evaluate,
    "evaluate_every": 2,
    "best": "nll",
    "checkpoints": sm.Checkpoints(tmp_path, every=100, keep=1, asynchronous=False),
  }
  _, records = run(learner, state, 8, **keywords)
  assert [record.get("eval/nll") for record in records[3::2]] == [3.0, 1.0, 2.0]
  assert saved == [[], [], ["4"], ["6"]]  # NaN is never the best
  assert sorted(os.listdir(tmp_path)) == ["6", "8"]


def test_json_lines_are_strict(tmp_path):
  log = sm.json_lines(tmp_path / "log.jsonl")
  log.begin(0, 1)
  log.record(0, {"a": math.nan, "b": 1.5})
  log.end()
  assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 0, "a": None, "b": 1.5}
  assert math.isnan(sm.read_json_lines(tmp_path / "log.jsonl")[0]["a"])


def test_progress_bar_and_tensorboard(tmp_path, capsys):
  learner, state = make()
  callbacks = [sm.progress_bar("name"), sm.tensorboard(tmp_path)]
  run(learner, state, 3, callbacks=callbacks)
  assert "name: 100%" in capsys.readouterr().err
  assert any("tfevents" in name for name in os.listdir(tmp_path))


def test_the_rate_of_a_progress_bar_leaves_out_the_first_update(monkeypatch, capsys):
  bars = []
  tqdm = importlib.import_module("tqdm.auto")
  make_bar = lambda *args, bar=tqdm.tqdm, **keywords: bars.append(bar(*args, **keywords)) or bars[0]
  monkeypatch.setattr(tqdm, "tqdm", make_bar)
  bar = sm.progress_bar()
  bar.begin(2, 6)
  begun = time.perf_counter()
  time.sleep(0.5)  # compilation
  for step in range(2, 6):
    bar.record(step, {"loss": math.nan, "phi_loss": 1.5, "converged": 0.25})
    time.sleep(0.02)
  assert bars[0].n == 6 and bars[0].format_dict["initial"] == 3
  assert bars[0].format_dict["elapsed"] < time.perf_counter() - begun - 0.4
  bar.end()
  assert "6/6" in (shown := capsys.readouterr().err)
  assert "phi_loss=1.500, converged=25%" in shown and " loss=" not in shown


def test_an_update_whose_tasks_all_fail_is_an_error_that_names_the_step():
  learner, state = make()

  def source(first, count):
    tasks = SOURCE(first, count)
    return tasks if first < 6 else jax.tree.map(lambda x: x * jnp.nan, tasks)

  records = []
  with pytest.raises(FloatingPointError, match=r"No task of step 2 had a finite loss"):
    run(learner, state, 5, source, callbacks=[sm.recorder(records)])
  assert [record["failed"] for record in records] == [0, 0, 3]


def ending(error, ended, record=lambda step, log_record: None):
  """A callback whose `end` is noted in `ended` and raises an error."""

  def end():
    ended.append(error)
    if error is not None:
      raise error

  return sm.Callback(lambda first, steps: None, record, end)


def test_a_failed_end_of_a_callback_is_logged_and_the_state_is_returned(caplog):
  learner, state = make()
  straight, _ = run(learner, state, 3)
  ended, full = [], OSError("the disk is full")
  callbacks = [ending(None, ended), ending(full, ended), ending(None, ended)]
  fitted, _ = run(learner, state, 3, callbacks=callbacks)
  chex.assert_trees_all_equal(fitted, straight)
  assert ended == [None, full, None]
  (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
  assert "The end of callbacks[1], ending.<locals>.end, failed" in error.getMessage()
  assert error.exc_info is not None and error.exc_info[1] is full  # the log has its traceback


def test_the_error_that_ended_a_run_stays_the_one_that_is_raised():
  learner, state = make()

  def stop(step, log_record):
    raise RuntimeError("the first error")

  ended, full = [], OSError("the disk is full")
  with pytest.raises(RuntimeError, match="the first error"):
    run(learner, state, 3, callbacks=[ending(full, ended, stop), ending(None, ended)])
  assert ended == [None, full]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_end_that_leaves_the_program_leaves_it_after_the_other_ends(error):
  learner, state = make()
  ended = []
  callbacks = [ending(OSError(), ended), ending(error, ended), ending(None, ended)]
  with pytest.raises(type(error)):
    run(learner, state, 1, callbacks=callbacks)
  assert len(ended) == 3


def warnings_of(caplog):
  return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_failed_tasks_are_warned_of_once(caplog):
  learner, state = make()

  def source(first, count):
    bad = (first == 3 * 2 + jnp.arange(3)) | (first + jnp.arange(count) == 11)
    spoilt = lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)
    return jax.tree.map(spoilt, SOURCE(first, count))

  _, records = run(learner, state, 5, source)
  assert [record["failed"] for record in records] == [0, 0, 1, 1, 0]
  (of_failures,) = [text for text in warnings_of(caplog) if "failed" in text]
  assert of_failures.startswith("1 of 3 tasks (33 %) of step 2 failed")
  assert "NaN" in of_failures and "labels out of range" in of_failures
  assert "concave" not in of_failures


def test_a_failure_of_the_evidence_names_its_own_cause(caplog):
  """Its curvature is negative where the log density is convex in the outputs."""
  likelihood = sm.Likelihood(lambda p, x: x * p["w"], lambda f, y: jnp.where(y > 0, f**2, -(f**2)))
  learner = sm.empirical_bayes(likelihood, {"w": "w"}, inner=sm.Inner(optax.sgd(0.01), 3))
  y = jnp.array([[1.0] * 4, [-1.0] * 4])
  tasks = sm.Task(sm.Batch(jnp.ones((2, 4)), y), None)
  state = learner.init({"w": 0.1})
  sm.fit(learner, state, lambda first, count: tasks, 1, meta_batch=2)
  assert any("concave in the outputs (docs/limits.md)" in text for text in warnings_of(caplog))
  with pytest.raises(FloatingPointError, match="a log_prob that is concave"):
    bad = sm.Task(sm.Batch(jnp.ones((2, 4)), jnp.ones((2, 4))), None)
    sm.fit(learner, state, lambda first, count: bad, 1, meta_batch=2)


@pytest.mark.parametrize(("steps", "share"), [(2, 0.0), (2000, 1.0)])
def test_few_converged_loops_are_warned_of_once(steps, share, caplog):
  linear = sm.gaussian(lambda theta, x: x * theta["w"], 1.0)
  learner = sm.sigma_imaml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), steps, tol=1e-4))
  batch = lambda count: sm.Batch(jnp.ones((count, 4)), 2.0 * jnp.ones((count, 4)))
  source = lambda first, count: sm.Task(batch(count), batch(count))
  _, records = run(learner, learner.init({"w": 0.0}), 25, source)
  assert {record["converged"] for record in records} == {share}
  found = warnings_of(caplog)
  if share == 1.0:
    assert found == []
  else:
    assert len(found) == 1
    assert found[0].startswith("0 % of the inner loops of the first 20 updates converged")
    assert "converged at 0.0001 (Inner.tol) or less" in found[0]
    assert "more steps (now 2) or a smaller step size, or lower init_sigma" in found[0]
    assert '"The mode was not reached"' in found[0]


def test_the_warning_of_a_resumed_run_names_its_updates(caplog):
  seen = Warnings(make()[0], 3, 30, 60)
  for step in range(30, 60):
    seen.see(step, {"failed": 0, "converged": 0.0, "inner_grad_norm": 1.0})
  (found,) = warnings_of(caplog)
  assert found.startswith("0 % of the inner loops of updates 30 to 49 converged")


def test_convergence_is_not_logged_where_it_is_not_known():
  """A loop of `maml` knows no gradient norm at its end: the share would always be 0."""
  _, records = run(*make("maml"), 1)
  assert "converged" not in records[0]
  _, records = run(*make("sigma_imaml"), 1)
  assert 0.0 <= records[0]["converged"] <= 1.0


def test_a_prior_whose_gradient_is_not_finite_is_an_error():
  learner, state = make()
  prior = lambda phi: -jnp.linalg.norm(0.0 * jax.tree.leaves(phi)[0])
  wrong = sm.sigma_imaml(learner.spec.likelihood, learner.labels, log_p_phi=prior)
  with pytest.raises(FloatingPointError, match="of step 0 is not finite.*look at log_p_phi"):
    run(wrong, state, 3)


def test_a_loop_that_diverges_fails_its_task():
  """Its gradient is finite, but not its square, which the norm and Adam need."""
  x = 30.0 + jnp.arange(6.0).reshape(1, 3, 2)
  batch = sm.Batch(x, jnp.ones([1, 3]))
  likelihood = sm.gaussian(lambda p, x: x @ p["w"])
  loop = sm.Inner(optax.sgd(0.5), steps=6)
  learner = sm.sigma_maml(likelihood, {"w": "w"}, inner=loop)
  state, tasks = learner.init({"w": jnp.ones(2)}), sm.Task(batch, batch)
  new, metrics = jax.jit(learner.update)(state, tasks)
  assert jnp.isfinite(metrics.val_nll).all() and jnp.isinf(metrics.task_grad_norm).all()
  assert metrics.num_failed == 1 and new.step == 1
  np.testing.assert_array_equal(new.phi["w"], state.phi["w"])
  with pytest.raises(FloatingPointError, match="No task of step 0.*Lower the inner step size"):
    sm.fit(learner, state, tasks, 1, meta_batch=1)


def test_wrong_arguments(tmp_path):
  learner, state = make()
  for keywords, message in (
    ({"meta_batch": 4, "micro_batches": 3}, "micro_batches must divide meta_batch"),
    ({"evaluate": lambda s: {}}, "go together"),
    ({"best": "nll"}, "there is no evaluate"),
    ({"evaluate": lambda s: {"a": 1.0}, "evaluate_every": 1, "best": "a"}, "pass checkpoints="),
  ):
    with pytest.raises(ValueError, match=message):
      run(learner, state, 1, **keywords)
  with pytest.raises(ValueError, match=r"gives \['eval/a'\]"):
    keywords = {"evaluate": lambda s: {"a": 1.0}, "evaluate_every": 1, "best": "b"}
    run(learner, state, 1, checkpoints=sm.Checkpoints(tmp_path / "b"), **keywords)
  with pytest.raises(ValueError, match="already that of step 7.*for 2 more pass steps=9"):
    run(learner, state._replace(step=jnp.asarray(7)), 2)
  for more in (1, -1):
    with pytest.raises(ValueError, match=rf"tasks\(0, 3\) returned {3 + more} tasks; 3 were asked"):
      run(learner, state, 1, lambda first, count, more=more: SOURCE(first, count + more))
  joint = sm.sigma_reptile(learner.spec.likelihood, learner.labels, sigma_gradient="joint")
  with pytest.raises(ValueError, match="micro_batches must be 1; got 3"):
    run(joint, state, 1, micro_batches=3)


def test_program_cost_counts_the_bytes():
  x = jnp.ones([256, 256])
  needed = sm.program_cost(jax.jit(lambda x: x @ x).lower(x).compile())
  assert needed is not None
  assert needed.arguments == needed.outputs == 4 * 256**2
  assert needed.bytes >= 2 * 4 * 256**2 and needed.flops >= 2 * 256**3
  donated = sm.program_cost(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
  assert donated is not None and donated.outputs == 0
  assert "MB a device" in str(needed)


SIGNALS = """
import os, signal, sys
from tests import fit_worker
import shrinkmeta as sm

learner, params = fit_worker.make_learner("maml", None, 4)
def source(first, count):
  if first == 3 * 4:  # during step 4
    {action}
  return fit_worker.source(first, count)
records = []
sm.fit(learner, learner.init(params), source, 10, meta_batch=3, callbacks=[sm.recorder(records)],
       checkpoints=sm.Checkpoints(sys.argv[1], every=100), stall_seconds=2.0)
"""


def child(action, folder):
  command = [sys.executable, "-c", SIGNALS.format(action=action), str(folder)]
  root = str(pathlib.Path(__file__).absolute().parents[2])
  return subprocess.run(
    command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=120
  )


def test_sigterm_saves_the_current_step(tmp_path):
  done = child("os.kill(os.getpid(), signal.SIGTERM)", tmp_path)
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  assert os.listdir(tmp_path) == ["5"]


def test_a_sigterm_that_stopped_nothing_is_raised_again():
  """It can come after the last step, while the last state is written."""
  received = []
  old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  try:
    for acted, wanted in ((False, [signal.SIGTERM]), (True, [])):
      received.clear()
      with stopping.stop_signals() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert not acted or stopped(3)
        assert received == []
      assert received == wanted
  finally:
    signal.signal(signal.SIGTERM, old)


@pytest.mark.usefixtures("ctrl_c")
def test_a_sigterm_after_an_interrupt_that_stopped_the_run_is_raised_again():
  received = []
  old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  try:
    with stopping.stop_signals() as stopped:
      signal.raise_signal(signal.SIGINT)
      assert stopped(1) == signal.SIGINT
      signal.raise_signal(signal.SIGTERM)
      assert received == []
    assert received == [signal.SIGTERM]
    with stopping.stop_signals() as stopped:  # the run acts on the SIGTERM
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGTERM)
      assert stopped(1) == signal.SIGTERM
    assert received == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, old)


def interrupting(at, times=1):
  """A callback that sends Ctrl-C in the update `at`."""

  def record(step, log_record):
    for _ in range(times if step == at else 0):
      signal.raise_signal(signal.SIGINT)

  return sm.Callback(lambda first, steps: None, record, lambda: None)


@pytest.fixture
def ctrl_c():
  """Python's own handler of Ctrl-C, also where the tests were started in the background."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_run_returns_its_state_and_continues_to_the_same_bits(tmp_path, caplog):
  learner, state = make()
  straight, _ = run(learner, state, 6)
  for checkpoints in (None, sm.Checkpoints(tmp_path, every=100)):
    keywords = {"checkpoints": checkpoints}
    caplog.clear()
    reached, _ = run(learner, state, 6, callbacks=[interrupting(2)], **keywords)
    assert reached.step == 3
    saved = "" if checkpoints is None else ", saved as 3"
    assert f"SIGINT: stopped; 3 of 6 updates done{saved}." in caplog.text
    assert checkpoints is None or os.listdir(tmp_path) == ["3"]
    # With checkpoints the folder knows the state, so that the start may be passed again.
    ended, records = run(learner, reached if checkpoints is None else state, 6, **keywords)
    assert [record["step"] for record in records] == [3, 4, 5]
    assert checkpoints is None or "Training continues from step 3 of 6" in caplog.text
    chex.assert_trees_all_equal(ended, straight)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_ends_a_run_at_once():
  learner, state = make()
  records = []
  with pytest.raises(KeyboardInterrupt):
    run(learner, state, 6, callbacks=[interrupting(2, times=2), sm.recorder(records)])
  assert [record["step"] for record in records] == [0, 1]  # the callback after it was not called
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_caller_keeps_the_interrupt():
  learner, state = make()
  received = []
  old = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
  try:
    ended, _ = run(learner, state, 4, callbacks=[interrupting(1)])
  finally:
    signal.signal(signal.SIGINT, old)
  assert received == [signal.SIGINT] and ended.step == 4


def test_in_another_thread_a_run_has_no_signals():
  learner, state = make()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ended, _ = pool.submit(run, learner, state, 2).result()
  assert ended.step == 2


def test_a_stall_ends_the_process_and_shows_where(tmp_path):
  done = child("import time; time.sleep(60)", tmp_path)
  assert done.returncode == 1
  assert "Timeout" in done.stderr and "in source" in done.stderr


@pytest.mark.slow
def test_five_thousand_updates_leave_nothing_behind():
  """After step 500 memory grows by less than 2 %, and the number of arrays does not grow."""
  learner, state = make()
  page = os.sysconf("SC_PAGE_SIZE")
  seen = {}

  def record(step, log_record):
    if step in (500, 4999):
      gc.collect()
      with open("/proc/self/statm") as file:
        seen[step] = int(file.read().split()[1]) * page, len(jax.live_arrays())

  watch = sm.Callback(lambda first, steps: None, record, lambda: None)
  run(learner, state, 5000, callbacks=[watch])
  assert seen[4999][1] == seen[500][1]
  assert seen[4999][0] < 1.02 * seen[500][0], seen


def test_another_meta_batch_is_another_run(tmp_path):
  learner, state = make()
  kept = sm.Checkpoints(tmp_path)
  run(learner, state, 2, checkpoints=kept)
  with pytest.raises(ValueError, match="argument meta_batch: 3 in it, 5 here"):
    run(learner, state, 4, checkpoints=kept, meta_batch=5)


def test_compilation_is_not_timed(monkeypatch):
  """Tasks of a new shape compile in the middle of a run. That may take longer than a step."""
  calls = []
  for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
    monkeypatch.setattr(faulthandler, name, lambda *a, name=name, **k: calls.append(name))
  watchdog = stopping.Watchdog(1.0)

  def traced(x):
    calls.append("traced")
    return x + 1

  f = programs.compile_per_shape(traced, watchdog)
  f(jnp.zeros(2))
  assert calls == ["traced"]  # the first step is not timed
  watchdog.start()
  f(jnp.zeros(2))
  assert calls[1:] == ["dump_traceback_later"]
  f(jnp.zeros(3))
  cancel, dump = "cancel_dump_traceback_later", "dump_traceback_later"
  assert calls[2:] == [cancel, "traced", dump]
  assert watchdog.stop() and not watchdog.stop()


def test_on_an_accelerator_the_watchdog_times_the_wait_for_a_step(monkeypatch):
  """The loop waits if it reads the numbers of the step at once, as for an evaluation."""
  events = []
  wait = jax.block_until_ready
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append("waited") or wait(x))
  monkeypatch.setattr(stopping.Watchdog, "start", lambda self: events.append("start"))
  monkeypatch.setattr(stopping.Watchdog, "stop", lambda self: events.append("stop"))
  learner, state = make()
  run(learner, state, 4, evaluate=lambda state: {"x": 0.0}, evaluate_every=2)
  assert events.count("waited") == 2
  for i, event in enumerate(events):
    if event == "waited":
      assert events[i - 1 : i + 2] == ["start", "waited", "stop"]


EMPTY = "tasks.train has no inputs or no targets"


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (lambda task: task._replace(train=tuple(task.train)[:2]), TypeError, "tasks.train must be a"),
    (lambda task: task._replace(val=task), TypeError, "tasks.val must be a shrinkmeta.Batch"),
    (
      lambda task: of_train(task, mask=jnp.ones((3, 6, 1))),
      ValueError,
      "tasks.train.mask must have",
    ),
    (lambda task: of_train(task, mask=jnp.ones((3, 7))), ValueError, "must lead with the same"),
    (lambda task: of_train(task, mask=jnp.ones(3)), ValueError, "train/mask must lead with"),
    (lambda task: of_train(task, targets=None), ValueError, EMPTY),
    (lambda task: of_train(task, inputs=None), ValueError, EMPTY),
  ],
)
def test_tasks_of_a_wrong_structure_are_named(change, error, message):
  learner, state = make()
  with pytest.raises(error, match=message):
    sm.fit(learner, state, lambda first, count: change(SOURCE(first, count)), 1, meta_batch=3)


def of_train(task, **changes):
  return task._replace(train=task.train._replace(**changes))


def test_an_empty_first_part_is_a_failed_task():
  learner, state = make()

  def source(first, count):
    task = SOURCE(first, count)
    real = ((first + jnp.arange(count)) % 4 > 0).astype(float)
    return of_train(task, mask=jnp.broadcast_to(real[:, None], task.train.targets.shape))

  _, records = run(learner, state, 1, source, meta_batch=4, micro_batches=4)
  assert records[0]["failed"] == 1.0 and np.isfinite(records[0]["loss"])


def test_targets_are_checked_only_where_a_call_on_all_examples_works():
  """These densities work for one task of six examples, and for any number of tasks under vmap."""
  weights = jnp.arange(1.0, 7.0)

  def callback(theta, x):
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(x), kind, x) * theta["w"]

  mine = sm.Likelihood(lambda theta, x: x * theta["w"], lambda f, y: -weights * jnp.square(f - y))
  x = jnp.ones((4, 6))
  tasks = sm.Task(sm.Batch(x.at[1].multiply(1e25), x), sm.Batch(x, x))  # the second diverges
  for likelihood in (mine, sm.gaussian(callback)):
    inner = sm.Inner(optax.sgd(0.1), 2)
    learner = sm.maml(likelihood, {"w": "w"}, inner=inner, batching="sequential")
    state = learner.init({"w": 0.0})
    assert sm.fit(learner, state, tasks, 2, meta_batch=4).step == 2
    assert sm.evaluate(learner, state, tasks).num_failed == 1


def test_wrong_labels_in_the_last_part_of_the_first_update_are_named():
  x, labels = jnp.ones((4, 6, 2)), jnp.zeros((4, 6), int).at[3, 0].set(7)
  learner = sm.maml(sm.categorical(lambda theta, x: x @ theta["w"]), {"w": "w"})
  tasks = sm.Task(sm.Batch(x, labels), sm.Batch(x, labels))
  for parts in (1, 2):
    with pytest.raises(ValueError, match=r"tasks\(.*train: labels must lie in 0..2"):
      sm.fit(learner, learner.init({"w": jnp.zeros((2, 3))}),
             lambda first, count: jax.tree.map(lambda x: x[first : first + count], tasks),
             1, meta_batch=4, micro_batches=parts)  # fmt: skip
