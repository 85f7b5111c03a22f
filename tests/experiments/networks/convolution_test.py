"""The convolution equals XLA's: values, derivatives of every order, transformations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

import shrinkmeta as sm
from experiments.networks import convolution
from experiments.networks.convolution import conv3x3

pytestmark = pytest.mark.usefixtures("x64")
LAYOUT = ("NHWC", "HWIO", "NHWC")
# N, H, W, C, F: on a CPU XLA's convolution, patches in the kernel gradient where C < 8, Winograd's
SMALL, MIDDLE, LARGE = (2, 5, 4, 3, 4), (2, 3, 7, 8, 5), (2, 5, 4, 32, 33)
SIZES = [
  SMALL,
  MIDDLE,
  LARGE,
  (1, 1, 1, 1, 1),
  (2, 2, 7, 1, 3),
  (2, 5, 6, 3, 16),
  (1, 3, 3, 32, 32),
  (3, 7, 6, 33, 32),
  (1, 4, 9, 40, 32),
]


def lax_conv(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def operands(size, seed=0, tasks=()):
  n, h, w, c, f = size
  return draw(seed, *tasks, n, h, w, c), draw(seed + 1, *tasks, 3, 3, c, f) / np.sqrt(c)


def loss(conv):
  """Bilinear in x and the kernel only through `conv`; with derivatives of every order."""
  return lambda x, kernel: jnp.mean(jnp.sin(conv(x, kernel)) * jnp.arange(kernel.shape[-1]))


def value_and_gradients(conv):
  return lambda x, kernel: (conv(x, kernel), jax.grad(loss(conv), (0, 1))(x, kernel))


def assert_close(ours, theirs, tolerance=1e-12):
  ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
  for a, b in zip(ours, theirs, strict=True):
    scale = float(jnp.max(jnp.abs(b)))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-3))


def primitives(jaxpr):
  """Names of all the primitives in a jaxpr and in those inside it."""
  names = set()
  for equation in jaxpr.eqns:
    names.add(equation.primitive.name)
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      names |= primitives(inner) if hasattr(inner, "eqns") else set()
  return names


@pytest.fixture
def both(optimising_jit):
  """(ours, XLA's): what the function f(conv) gives, compiled; ours also `as_users` compile it.

  Arrays are arguments: XLA would work out constants while it compiles, slowly and by other means.
  """

  def run(f, *args, as_users=False):
    jit = optimising_jit if as_users else jax.jit
    return jit(f(conv3x3))(*args), jax.jit(f(lax_conv))(*args)

  return run


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_those_of_lax(size, both):
  x, kernel = operands(size)
  assert_close(*both(value_and_gradients, x, kernel, as_users=True))


@pytest.mark.parametrize("size", [(5, 5, 4, 32, 32), (5, 5, 4, 32, 33)])
def test_images_in_blocks_that_do_not_divide_them(size, monkeypatch):
  """Two images a block, one block filled up; results in the place of their images, or not."""
  monkeypatch.setattr(convolution, "_BLOCK", 2 * 16 * 6 * max(size[3:]))
  x, kernel = operands(size)
  ours, theirs = (jax.jit(jax.grad(loss(conv), (0, 1)))(x, kernel) for conv in (conv3x3, lax_conv))
  assert_close(ours, theirs)
  assert "while" in jax.jit(conv3x3).lower(x, kernel).as_text()  # there are blocks


@pytest.mark.parametrize(
  "channels,features,padded",
  [(1, 16, (1, 32)), (3, 20, (4, 32)), (4, 20, (4, 20)), (3, 40, (3, 40)), (16, 16, (16, 16))],
)
def test_few_channels_and_features_get_zeros(channels, features, padded):
  x, kernel = operands((2, 8, 8, channels, features))
  text = jax.jit(conv3x3).lower(x.astype(jnp.float32), kernel.astype(jnp.float32)).as_text()
  (line,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  assert f"tensor<3x3x{padded[0]}x{padded[1]}xf32>" in line


def scans_of(jaxpr):
  """The equations of loops in a program, and in the programs that it calls."""
  found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  inner = [body for eqn in jaxpr.eqns for body in jaxprs_in_params(eqn.params)]
  return found + [eqn for body in inner for eqn in scans_of(body)]


def test_blocks_take_the_place_of_their_images_within_a_mesh_too():
  """A scan that stacks results would begin with an array of zeros beside the images."""
  mesh = sm.task_mesh(jax.devices()[:1])

  def has_carry(f):
    split = jax.P("tasks")
    mapped = jax.shard_map(
      lambda x: convolution.in_blocks(f, x, 2),
      mesh=mesh,
      in_specs=split,
      out_specs=split,
      check_vma=False,
    )
    x = jnp.arange(5.0)[:, None]
    np.testing.assert_array_equal(jax.jit(mapped)(x), f(x))
    (scan,) = scans_of(jax.make_jaxpr(mapped)(x).jaxpr)
    outputs = zip(scan.outvars, scan.params["jaxpr"].jaxpr.outvars, strict=True)
    return any(whole.aval.shape == of_step.aval.shape for whole, of_step in outputs)

  assert not has_carry(lambda x: jnp.concatenate([x, x], 1))  # stacks: another shape
  assert has_carry(jnp.sin)


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
def test_hessian_products_in_both_modes(size, both):
  def products(conv):
    grad = jax.grad(loss(conv), (0, 1))
    dot = lambda p, v: sum(jnp.vdot(a, b) for a, b in zip(grad(*p), v, strict=True))
    return lambda p, v: (jax.jvp(grad, p, v)[1], jax.grad(dot)(p, v))

  ours, theirs = both(products, operands(size), operands(size, seed=7), as_users=size == LARGE)
  assert_close(ours, theirs)
  assert_close(ours[0], ours[1])


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_third_derivatives(size, both):
  def third(conv):
    hessian = lambda p, v: jax.jvp(jax.grad(loss(conv), (0, 1)), p, v)[1]
    dot = lambda p, v, u: sum(jnp.vdot(a, b) for a, b in zip(hessian(p, v), u, strict=True))
    return jax.grad(dot)

  assert_close(*both(third, *(operands(size, seed=seed) for seed in (0, 7, 9))))


def test_gradients_are_those_of_central_differences():
  f = jax.jit(lambda *p: jnp.sum(jnp.sin(conv3x3(*p))))
  check_grads(f, operands(SMALL), 2, eps=1e-4, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
def test_vmap_of_values_and_of_both_transposes(size, both):
  alone, batched = operands(size), operands(size, seed=3, tasks=(3,))
  cases = []
  for axes in ((0, None), (None, 0), (2, 4)):
    pairs = zip(alone, batched, axes, strict=True)
    cases.append((axes, [a if i is None else jnp.moveaxis(b, 0, i) for a, b, i in pairs]))

  def every(conv):
    gradient = jax.grad(loss(conv), (0, 1))
    product = lambda x, kernel, v: jax.jvp(jax.grad(loss(conv)), (x, kernel), v)[1]
    one = lambda x, kernel, v: (conv(x, kernel), gradient(x, kernel), product(x, kernel, v))
    mapped = [jax.vmap(one, (*axes, None)) for axes, _ in cases]
    return lambda operands, v: [f(*o, v) for f, o in zip(mapped, operands, strict=True)]

  ours, theirs = both(every, [o for _, o in cases], alone, as_users=size == LARGE)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert_close(a, b)


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
def test_gradient_of_a_vmap(size, both):
  alone, batched = operands(size), operands(size, seed=3, tasks=(3,))
  every = ((0, None), (None, 0), (0, 0))
  pick = lambda axes: tuple(
    a if i is None else b for a, b, i in zip(alone, batched, axes, strict=True)
  )
  primals = [pick(axes) for axes in every]

  def products(conv):
    def product(axes, p, v):
      total = lambda *p: jnp.sum(jax.vmap(loss(conv), axes)(*p) ** 2)
      return jax.jvp(jax.grad(total, (0, 1)), p, v)

    return lambda ps, vs: [product(*one) for one in zip(every, ps, vs, strict=True)]

  for ours, theirs in zip(*both(products, primals, jax.tree.map(jnp.cos, primals)), strict=True):
    assert_close(ours, theirs)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_nested_vmaps_and_jacobians(size):
  """Each operand of the kernel gradient is batched alone in a Jacobian: forward y, reverse x."""
  (x, _), (_, kernels) = operands(size), operands(size, tasks=(2, 3))
  ours, theirs = (
    jax.vmap(jax.vmap(conv, (None, 0)), (None, 0))(x, kernels) for conv in (conv3x3, lax_conv)
  )
  assert_close(ours, theirs)
  ys = jax.vmap(jax.vmap(lambda k: jnp.sin(conv3x3(x, k))))(kernels)
  pull = lambda conv: lambda x, y: jax.vjp(lambda k: conv(x, k), kernels[0, 0])[1](y)[0]
  for axes, left, right in (
    ((None, 0), x, ys[0]),
    ((0, None), jnp.stack([x, 2 * x, x**2]), ys[0, 0]),
  ):
    ours, theirs = (jax.vmap(pull(conv), axes)(left, right) for conv in (conv3x3, lax_conv))
    assert_close(ours, theirs)


def test_every_derivative_is_one_of_two_primitives():
  primal = operands(SMALL)
  hessian = lambda *p: jax.jvp(jax.grad(loss(conv3x3), (0, 1)), p, primal)[1]
  third = jax.grad(lambda *p: jnp.sum(hessian(*p)[0] ** 2), (0, 1))
  batched = operands(SMALL, tasks=(3,))
  for function, args in ((hessian, primal), (third, primal), (jax.vmap(third), batched)):
    names = primitives(jax.make_jaxpr(function)(*args).jaxpr)
    assert {n for n in names if "conv" in n or "dot" in n} - {"convert_element_type"} == {
      "conv3x3",
      "conv3x3_kernel_gradient",
    }


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda f: f], ids=["checkpointed", "plain"])
def test_gradient_steps_in_a_scan(size, wrap, both):
  def trained(conv):
    def end(kernel, x):
      step = wrap(lambda k, _: (k - 0.1 * jax.grad(loss(conv), 1)(x, k), None))
      return jnp.sum(jax.lax.scan(step, kernel, length=3)[0] ** 2)

    return jax.value_and_grad(end)

  x, kernel = operands(size)
  assert_close(*both(trained, kernel, x))


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
def test_no_grouped_convolution_on_a_cpu(size):
  """Per-task gradients of per-task kernels, and of one kernel that the tasks share."""

  def grouped(conv, axes, args):
    text = jax.jit(jax.vmap(jax.grad(loss(conv), (0, 1)), axes)).lower(*args).as_text()
    return re.findall(r"(?:feature|batch)_group_count = (?!1\b)\d+", text)

  with jax.default_device(jax.devices("cpu")[0]):
    x, kernels = operands(size, tasks=(3,))
    for axes, args in (((0, 0), (x, kernels)), ((0, None), (x, kernels[0]))):
      assert not grouped(conv3x3, axes, args)
      assert grouped(lax_conv, axes, args)  # so the pattern finds what it looks for


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_accelerator_gets_the_ordinary_convolution(size):
  x, kernels = operands(size, tasks=(3,))
  counts = {}
  for conv in (conv3x3, lax_conv):
    for name, function, args in (
      ("one", conv, (x[0], kernels[0])),
      ("gradient", jax.grad(loss(conv), (0, 1)), (x[0], kernels[0])),
      ("tasks", jax.vmap(jax.grad(loss(conv), (0, 1))), (x, kernels)),
      ("shared", jax.vmap(conv, (0, None)), (x, kernels[0])),
    ):
      text = jax.export.export(jax.jit(function), platforms=["cuda"])(*args).mlir_module()
      convolutions = re.findall(r"(?:feature|batch)_group_count = \d+", text)
      assert "dot_general" not in text
      counts.setdefault(name, []).append(sorted(convolutions))
  for ours, theirs in counts.values():
    assert ours == theirs


@pytest.mark.parametrize("size", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_lower_precisions(size, dtype, tolerance):
  x, kernel = (a.astype(dtype) for a in operands(size))
  ours = jax.jit(value_and_gradients(conv3x3))(x, kernel)
  assert all(a.dtype == dtype for a in jax.tree.leaves(ours))
  exact = jax.tree.map(lambda a: a.astype(jnp.float64), (x, kernel))
  theirs = jax.jit(value_and_gradients(lax_conv))(*exact)
  ours = jax.tree.map(lambda a: a.astype(jnp.float64), ours)
  assert_close(ours, theirs, tolerance)


def test_types_are_promoted():
  x, kernel = operands(SMALL)
  assert_close(conv3x3(jnp.ones(x.shape, jnp.uint8), kernel), lax_conv(jnp.ones_like(x), kernel))


@pytest.mark.parametrize(
  "x,kernel",
  [((4, 4, 3), (3, 3, 3, 5)), ((2, 4, 4, 3), (5, 5, 3, 5)), ((2, 4, 4, 3), (3, 3, 4, 5))],
)
def test_wrong_shapes(x, kernel):
  with pytest.raises(ValueError, match="wants images") as error:
    conv3x3(jnp.ones(x), jnp.ones(kernel))
  assert str(x) in str(error.value) and str(kernel) in str(error.value)


def test_winograd_serves_the_large_sizes_only():
  """The sizes above are meant to reach every implementation."""
  pays = lambda size: convolution._winograd_pays(jnp.ones((1, *size[:4])), size[4])
  assert [pays(size) for size in (SMALL, MIDDLE, LARGE)] == [False, False, True]
  assert sum(map(pays, SIZES)) == 3
