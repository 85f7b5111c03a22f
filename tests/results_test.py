"""The pages of results equal what their CSV files give, and link to each other."""

import pathlib
import re

import pytest

from results import build

ROOT = pathlib.Path(build.__file__).parent
TEXT_COLUMNS = {
  "activation",
  "adapted_as",
  "algorithm",
  "batch_norm",
  "character_numbers",
  "clipped",
  "form",
  "framework",
  "gradient_of",
  "inner_loop",
  "inner_optimizer",
  "module",
  "modules",
  "network",
  "outer_optimizer",
  "phi_of",
  "pooled",
  "rival",
  "searched_with",
  "seed_numbers",
  "setting",
  "settings",
  "split",
  "table",
  "task",
  "task_specific",
  "task_specific_modules",
}
CSV_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.csv"))


def written_pages():
  return [path for path in ROOT.rglob("*.md") if not path.name.endswith(".text.md")]


def linked_files(page):
  """The files to which a page links; links to other sites are left out."""
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
    if not re.match(r"\w+:", target):
      yield (page.parent / target.partition("#")[0]).resolve()


def test_pages_are_what_their_csv_files_give():
  for path, contents in build.pages().items():
    assert path.read_text(encoding="utf-8") == contents, f"{path}: run python results/build.py"


@pytest.mark.parametrize("name", CSV_FILES)
def test_columns_are_numeric(name):
  header, records = build.read(ROOT / name)
  assert records
  assert len(set(header)) == len(header)
  for column in header:
    if column in TEXT_COLUMNS or column.endswith("_rival"):
      continue
    values = [record[column] for record in records if record[column]]
    assert values, f"{column} is empty"
    assert all(re.fullmatch(r"nan|-?[\d.]+(e[+-]?\d+)?", value) for value in values), column
    assert all(map(build.is_number, values)), column


@pytest.mark.parametrize("name", CSV_FILES)
def test_an_interval_belongs_to_a_column(name):
  header, records = build.read(ROOT / name)
  for column in header:
    if column.endswith("_ci95"):
      value = column.removesuffix("_ci95")
      assert value in header
      for record in records:
        assert (record[column] == "") == (record[value] in ("", "nan"))
        assert record[column] == "" or float(record[column]) >= 0


def test_every_csv_file_is_on_a_page():
  linked = {path for page in written_pages() for path in linked_files(page)}
  assert {(ROOT / name).resolve() for name in CSV_FILES} <= linked


def test_the_index_has_every_page_on_one_screen():
  index = ROOT / "README.md"
  others = {path.resolve() for path in written_pages()} - {index.resolve()}
  assert others <= set(linked_files(index))
  assert len(index.read_text(encoding="utf-8").splitlines()) <= 55


def test_links_point_to_files():
  for page in ROOT.rglob("*.md"):
    missing = [path for path in linked_files(page) if not path.exists()]
    assert not missing, f"{page}: {missing}"


class TestTables:
  def page(self, folder, csv_text, directive):
    (folder / "a.csv").write_text(csv_text, encoding="utf-8")
    (folder / "p.text.md").write_text(f"<!-- table: a.csv{directive} -->\n", encoding="utf-8")
    (contents,) = build.pages(folder).values()
    return [[c.strip() for c in line[1:-1].split("|")] for line in re.findall(r"\|.*\|", contents)]

  def test_a_cell_has_sign_interval_rival_and_step(self, tmp_path):
    head, _, *rows = self.page(
      tmp_path,
      "algorithm,accuracy_difference_points,accuracy_difference_points_ci95,"
      "accuracy_difference_points_rival,accuracy_difference_points_step\n"
      "maml,2.50,0.1,anil,10\nboil,-1.0,0.2,,30\nimaml,nan,,,\nhead,5.1e-03,0.20,,\n"
      "biases,-3.4e+20,4.4e+20,,\n",
      "",
    )
    assert head == ["algorithm", "difference in accuracy, points"]
    assert rows == [
      ["maml", "+2.50 ± 0.1 (anil @ 10)"],
      ["boil", "-1.0 ± 0.2 (30)"],
      ["imaml", "diverged"],
      ["head", "+0.01 ± 0.20"],
      ["biases", "-3.4e+20 ± 4.4e+20"],
    ]

  def test_across_makes_a_column_for_each_value(self, tmp_path):
    head, _, *rows = self.page(
      tmp_path,
      "algorithm,split,step,nll_nats_per_example\na,test,0,3.0\na,test,10,2.0\nb,test,10,1.0\n",
      " without split across step",
    )
    assert head == ["algorithm", "0", "10"]
    assert rows == [["a", "3.0", "2.0"], ["b", "", "1.0"]]

  def test_listing_joins_pairs(self, tmp_path):
    _, _, *rows = self.page(
      tmp_path,
      "algorithm,module,sigma\na,head,1.20\na,body,0.1\nb,body,2\n",
      " listing module, sigma",
    )
    assert rows == [["a", "head 1.20, body 0.1"], ["b", "body 2"]]

  @pytest.mark.parametrize("directive", [" without c", " sideways"])
  def test_a_directive_that_cannot_be_followed(self, tmp_path, directive):
    with pytest.raises(ValueError):
      self.page(tmp_path, "a,b\n1,2\n", directive)

  @pytest.mark.parametrize("record", ["1", "1,2,3"])
  def test_a_record_of_another_length(self, tmp_path, record):
    with pytest.raises(ValueError, match="want 2 fields"):
      self.page(tmp_path, f"a,b\n{record}\n", "")
