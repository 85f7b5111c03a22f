from experiments.report.tables import cost


def test_the_table_of_settings_leaves_out_what_no_algorithm_uses():
  table = cost.settings_table(
    {
      "maml": {"inner_rate": 0.5, "inner_decay": 0, "searched_with": "", "trials": 0},
      "sigma_imaml": {"inner_rate": 0.2, "inner_decay": 0, "init_sigma": 0.3, "trials": 0},
    }
  )
  header, rows = table.splitlines()[2], table.splitlines()[4:]
  cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
  assert cells(header) == ["algorithm", "inner_rate", "trials", "init_sigma"]
  assert [cells(row) for row in rows] == [
    ["maml", "0.5", "0", ""],
    ["sigma_imaml", "0.2", "0", "0.3"],
  ]
