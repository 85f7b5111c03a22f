"""Read the operations of a compiled program."""

import re


def factorisations(compiled):
  """(number of LAPACK's calls, pairs of them of which neither waits for the other)."""
  bodies, name = {}, ""
  for line in compiled.as_text().splitlines():
    if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      name = head[1]
      bodies[name] = []
    elif " = " in line and name:
      bodies[name].append(line)

  def inside(line):
    return "lapack_" in line or any(
      inside(inner)
      for word in re.findall(r"=\{?%?([\w.-]+)", line)
      for inner in bodies.get(word, ())
    )

  count, pairs = 0, []
  for lines in bodies.values():
    before = {}  # of every value, the factorisations that it waits for
    for line in lines:
      left, right = line.split(" = ", 1)
      waits = set().union(*(before.get(v, set()) for v in re.findall(r"%([\w.-]+)", right)))
      if inside(right):
        pairs += [(other, left) for other in before.get("", set()) - waits]
        waits.add(left.strip())
        before[""] = before.get("", set()) | {left.strip()}
        count += 1
      before[left.replace("ROOT", "").strip(" %")] = waits
  return count, pairs
