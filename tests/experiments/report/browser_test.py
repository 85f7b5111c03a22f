"""A page is opened where there is a display, and elsewhere its path is told."""

import logging
import webbrowser

import pytest

from experiments.report import browser


@pytest.fixture
def opened(monkeypatch):
  """The addresses that a browser was given; there is no display yet."""
  found: list[str] = []
  monkeypatch.setattr(browser.sys, "platform", "linux")
  for name in ("DISPLAY", "WAYLAND_DISPLAY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(webbrowser, "open", lambda url: not found.append(url))
  return found


@pytest.mark.parametrize("name", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_where_there_is_a_display(tmp_path, monkeypatch, opened, name):
  monkeypatch.setenv(name, ":0")
  browser.show(tmp_path / "a b.html")
  assert opened == [(tmp_path / "a b.html").as_uri()]


def test_without_a_display_the_path_is_told(tmp_path, opened, caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    browser.show(tmp_path / "page.html")
  assert not opened and f"Copy {tmp_path / 'page.html'} to" in caplog.text


def test_without_a_browser_the_path_is_told(tmp_path, monkeypatch, opened, caplog):
  monkeypatch.setenv("DISPLAY", ":0")
  monkeypatch.setattr(webbrowser, "open", lambda url: False)
  with caplog.at_level(logging.WARNING, logger="absl"):
    browser.show(tmp_path / "page.html")
  assert f"No browser could be started. The page is {tmp_path / 'page.html'}" in caplog.text
