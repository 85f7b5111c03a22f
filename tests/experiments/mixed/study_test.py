"""The study of starts, with a few designs and a few starts."""


def test_no_design_of_a_few_is_missed(command):
  done = command("mixed.study_starts", "--designs=2", "--starts=2")
  assert done.returncode == 0, done.stderr[-3000:]
  last = done.stdout.splitlines()[-1]
  assert last.startswith("2 designs from 0, seed 0: 0 more than 0.01 nats below the best of 2")
  assert "0 not converged" in last
