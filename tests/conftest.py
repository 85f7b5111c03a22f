"""Fixtures shared by the tests of the library."""

import jax
import pytest


@pytest.fixture
def x64():
  """Double precision for one test; the tests after it are back in float32."""
  with jax.enable_x64(True):
    yield
