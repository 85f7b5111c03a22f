"""Read the operations of a compiled program."""

import math
import re

_CALL = re.compile(r'= \(?f(?:32|64)\[([\d,]*)\].* custom_call_target="lapack_')


def factorisations(compiled):
  """The number of matrices that each of LAPACK's calls takes at once."""
  lines = [line for line in compiled.as_text().splitlines() if '"lapack_' in line]
  # The first result of each is [..., m, n].
  shapes = [_CALL.search(line)[1].split(",") for line in lines]
  return [math.prod(map(int, shape[:-2])) for shape in shapes]
