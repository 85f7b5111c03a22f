"""Logs in JSON: numbers that are not finite, links, files of other programs."""

import json
import math
import os

import pytest

import shrinkmeta as sm


def log(path, *records, first=0):
  callback = sm.json_lines(path)
  callback.begin(first, first + len(records))
  for step, record in enumerate(records, first):
    callback.record(step, record)
  callback.end()


def test_infinite_numbers_and_nan_come_back_as_themselves(tmp_path):
  path = tmp_path / "log.jsonl"
  log(path, {"sigma/free": math.inf, "loss": -math.inf, "eval/nll": math.nan, "a": 1.5})

  def refuse(constant):
    raise AssertionError(f"{constant} is not strict JSON")

  written = json.loads(path.read_text(), parse_constant=refuse)
  wanted = {"step": 0, "sigma/free": "inf", "loss": "-inf", "eval/nll": None, "a": 1.5}
  assert written == wanted
  (record,) = sm.read_json_lines(path)
  assert math.isnan(record.pop("eval/nll"))
  assert record == {"step": 0, "sigma/free": math.inf, "loss": -math.inf, "a": 1.5}


def test_a_log_of_an_earlier_version_reads_as_before(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text('{"step": 0, "loss": null, "a": 2}\n{"step": 1, "note": "word"}\n{"step": 2, "lo')
  first, second = sm.read_json_lines(path)
  assert math.isnan(first.pop("loss")) and first == {"step": 0, "a": 2}
  assert second == {"step": 1, "note": "word"}
  log(path, {"loss": math.inf}, first=1)
  assert [record["loss"] for record in sm.read_json_lines(path)][1:] == [math.inf]


def test_the_log_of_a_free_module_has_a_picture(tmp_path):
  pytest.importorskip("matplotlib")
  path = tmp_path / "log.jsonl"
  log(path, *({"sigma/free": math.inf, "sigma/body": 0.3} for _ in range(3)))
  (ax,) = sm.plots.sigma_history(sm.read_json_lines(path)).axes
  assert {"free", "body"} <= {text.get_text() for text in ax.texts}


def test_a_link_to_a_log_stays_a_link(tmp_path):
  (tmp_path / "disk").mkdir()
  link, file = tmp_path / "log.jsonl", tmp_path / "disk" / "run.jsonl"
  link.symlink_to(file)
  log(link, {"a": 0.0}, {"a": 1.0})  # the file does not exist yet
  log(link, {"a": 2.0}, first=1)
  assert link.is_symlink() and os.listdir(tmp_path / "disk") == ["run.jsonl"]
  assert [record["a"] for record in sm.read_json_lines(file)] == [0.0, 2.0]


def test_a_device_is_written_and_not_replaced(monkeypatch):
  replaced = []
  monkeypatch.setattr(os, "replace", lambda *paths: replaced.append(paths))
  log(os.devnull, {"a": 0.5})
  assert replaced == []


RECORD = '{"step": 0, "loss": 0.5}\n'


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (RECORD + "hello\n", "Line 2 is 'hello"),
    ("hello", "Line 1 is 'hello'"),  # not a line that a killed run began
    ("[1]\n", r"Line 1 is '\[1\]"),
    ('{"rate": 0.5}', "Line 1 is '{\"rate\": 0.5}'"),
    (RECORD + '{"step": "a"}\n', "Line 2 is"),
    (b"\x89PNG\xff", "It is not text"),
  ],
)
def test_a_file_of_another_program_is_named_and_left_as_it_is(tmp_path, content, what):
  path = tmp_path / "log.jsonl"
  content = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(content)
  message = f"log.jsonl must be a log of json_lines, .*{what}.*Name another file"
  with pytest.raises(ValueError, match=message):
    sm.json_lines(path).begin(0, 1)
  assert path.read_bytes() == content and os.listdir(tmp_path) == ["log.jsonl"]
  if content.endswith((b"hello\n", b"[1]\n")) or b"PNG" in content:
    with pytest.raises(ValueError, match=message):
      sm.read_json_lines(path)


def test_a_file_that_cannot_be_written_is_an_error_before_the_first_update(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError, match="log.jsonl cannot be written: .*Name another file"):
    sm.json_lines(tmp_path / "file" / "log.jsonl").begin(0, 1)
