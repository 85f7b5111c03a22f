"""Spreads, slopes, alternating timing, and the analysis of a compiled step."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import measure


def test_spread_and_ratios():
  assert measure.spread([4.0, 1.0, 2.0, 3.0]) == (2.5, 1.0, 4.0, 4)
  assert measure.ratios([2.0, 9.0], [1.0, 3.0]) == (2.5, 2.0, 3.0, 2)
  with pytest.raises(ValueError, match="one value"):
    measure.spread([])


def test_slope_is_that_of_the_upper_half():
  x = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
  np.testing.assert_allclose(measure.loglog_slope(x, 3.0 * x**1.5), 1.5)
  bent = np.where(x < 16, 5.0, 5.0 * x / 16)  # a fixed cost below
  np.testing.assert_allclose(measure.loglog_slope(x, bent), 1.0)
  with pytest.raises(ValueError, match="two points"):
    measure.loglog_slope([1, 2, 100], [1.0, 1.0, 1.0])


def test_in_turn_is_paired():
  calls = []
  timings = measure.time_in_turn(
    {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 10.0
  )
  assert list(timings) == ["a", "b"]
  assert len(timings["a"].seconds) == len(timings["b"].seconds) >= 3
  assert min(timings["a"].seconds) > 0 and calls[0] == "a" and calls[-1] == "b"


def test_one_round_runs_however_little_time_there_is():
  assert len(measure.time_in_turn({"a": lambda: None}, 5, 0.0)["a"].seconds) == 1


@pytest.mark.parametrize("others, contended", [(0.0, False), (99.0, True), (None, False)])
def test_rounds_are_contended_where_others_used_the_cores(monkeypatch, others, contended):
  seen = lambda step, group: measure._Repetition(1e-3, 1.0, others)
  monkeypatch.setattr(measure, "_repeat", seen)
  assert measure.time_in_turn({"a": lambda: None}, 5, 0.0)["a"].contended == contended


def test_compiled_step():
  a = jnp.ones((64, 32), jnp.float32)
  compiled = measure.compile_step(lambda x: x @ x.T, a)
  np.testing.assert_array_equal(compiled.call(a), a @ a.T)
  assert compiled.xla_flops == 2 * 64 * 64 * 32
  assert compiled.compile_seconds > 0 and compiled.temp_bytes is not None
  assert measure.matmul_rate(64, 1) > 0 and measure.peak_memory() > 2**20
