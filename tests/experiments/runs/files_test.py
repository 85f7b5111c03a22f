import pytest

from experiments.runs import files


def test_atomic_hides_the_file_until_it_is_whole(tmp_path):
  names = lambda: sorted(file.name for file in tmp_path.iterdir())
  with pytest.raises(KeyboardInterrupt), files.atomic(tmp_path / "result.json") as temporary:
    temporary.write_text("half")
    assert "result.json" not in names()
    raise KeyboardInterrupt
  assert names() == []
