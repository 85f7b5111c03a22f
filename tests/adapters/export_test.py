"""PEFT folders written from JAX are read back here, and by peft if it is installed."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.adapters import export, lora
from tests.adapters.networks import random_like

KEY = jax.random.key(0)


def adapters_of(shapes, rules):
  return random_like(lora.init(KEY, {k: jnp.ones(v) for k, v in shapes.items()}, rules))


@pytest.fixture
def safetensors():
  return pytest.importorskip("safetensors.flax", reason="safetensors is not installed")


@pytest.fixture
def read(safetensors):
  """A function: folder -> (tensors, configuration) of an adapter."""
  return lambda folder: (
    safetensors.load_file(folder / "adapter_model.safetensors"),
    json.loads((folder / "adapter_config.json").read_text()),
  )


def test_files_by_hand(read, tmp_path):
  shapes = {"q": [5, 4], "layers": [2, 5, 3], "conv": [3, 2, 5, 7], "heads": [5, 2, 3]}
  rules = {"^q": 2, "layers": 2, "conv": 3, "heads": (2, "ioo")}
  adapters = adapters_of(shapes, rules)
  names = {
    "q": "q_proj",
    "layers": "h.{i}.fc",
    "conv": "stem",
    "heads": "attn.v_proj",
    "other": "x",
  }
  folder = export.peft(
    tmp_path / "new" / "task", adapters, names, 6.0, "org/base", modules_to_save={
      "lm_head": {"weight": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    }
  )  # fmt: skip
  tensors, config = read(folder)
  start = "base_model.model."
  np.testing.assert_array_equal(tensors[start + "q_proj.lora_A.weight"], adapters["q"]["A"].T)
  np.testing.assert_array_equal(tensors[start + "q_proj.lora_B.weight"], adapters["q"]["B"].T)
  for n in range(2):
    a = adapters["layers"]["A"][n]
    np.testing.assert_array_equal(tensors[f"{start}h.{n}.fc.lora_A.weight"], a.T)
  a, b = tensors[start + "stem.lora_A.weight"], tensors[start + "stem.lora_B.weight"]
  np.testing.assert_array_equal(a, jnp.einsum("hwir->rihw", adapters["conv"]["A"]))
  np.testing.assert_array_equal(b[:, :, 0, 0], adapters["conv"]["B"].T)
  b = adapters["heads"]["B"].reshape(2, 6)
  np.testing.assert_array_equal(tensors[start + "attn.v_proj.lora_B.weight"], b.T)
  np.testing.assert_array_equal(tensors[start + "lm_head.weight"], [[0, 3], [1, 4], [2, 5]])
  assert len(tensors) == 11
  assert config["target_modules"] == ["attn.v_proj", "h.0.fc", "h.1.fc", "q_proj", "stem"]
  assert (config["r"], config["lora_alpha"]) == (2, 6)
  assert (config["rank_pattern"], config["alpha_pattern"]) == ({"stem": 3}, {})
  assert config["modules_to_save"] == ["lm_head"]
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["task"]


def test_split_layers_and_alpha_none(read, tmp_path):
  adapters = adapters_of({"layers": [2, 5, 3], "q": [5, 4]}, {"layers": 1, "q": 2})
  names = {"layers": "h.{i}.fc", "q": "a.q"}
  folder = export.peft(tmp_path / "a", lora.split_layers(adapters), names, None, "base")
  tensors, config = read(folder)
  want, _ = read(export.peft(tmp_path / "b", adapters, names, None, "base"))
  jax.tree.map(np.testing.assert_array_equal, tensors, want)
  assert (config["r"], config["lora_alpha"]) == (1, 1)
  assert config["rank_pattern"] == config["alpha_pattern"] == {r"a\.q": 2}


def test_bfloat16_and_a_whole_network(safetensors, tmp_path):
  params = {"w": jnp.ones([5, 4]), "layers": random_like(jnp.ones([2, 4, 3])), "b": jnp.ones([3])}
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  adapters = random_like(lora.init(KEY, params, {"w": 2, "layers": 1}))
  names = {"w": ("fc.weight", (1, 0)), "layers": ("h.{i}.weight", (1, 0)), "b": "fc.bias"}
  folder = export.merged(tmp_path / "a", params, adapters, names, 3.0, config={"width": 5})
  tensors = safetensors.load_file(folder / "model.safetensors")
  want = lora.merge(params, adapters, 3.0)
  np.testing.assert_array_equal(tensors["fc.weight"], want["w"].T)
  np.testing.assert_array_equal(tensors["h.1.weight"], want["layers"][1].T)
  np.testing.assert_array_equal(tensors["fc.bias"], want["b"])
  assert tensors["fc.weight"].dtype == jnp.bfloat16 and len(tensors) == 4
  assert json.loads((folder / "config.json").read_text()) == {"width": 5}
  plain = export.merged(tmp_path / "b", {"x": params}, {"x": adapters})
  assert set(safetensors.load_file(plain / "model.safetensors")) == {"x.w", "x.layers", "x.b"}
  scalar = export.merged(tmp_path / "d", params | {"scale": jnp.float32(2)}, adapters)
  read = safetensors.load_file(scalar / "model.safetensors")
  assert read["scale"].shape == () and read["scale"] == 2
  with pytest.raises(ValueError, match=r"names\['scale'\] has \"{i}\", but .* no axis of layers"):
    more = params | {"scale": jnp.float32(2)}
    export.merged(tmp_path / "e", more, adapters, {**names, "scale": "s.{i}"})
  with pytest.raises(ValueError, match="names has no entry for the parameter 'b'"):
    export.merged(tmp_path / "c", params, adapters, {"w": "w", "layers": "l"})
  with pytest.raises(ValueError, match="gives the name 'w' to two parameters"):
    export.merged(tmp_path / "c", params, adapters, dict.fromkeys(params, "w"))


@pytest.mark.usefixtures("safetensors")
def test_wrong_arguments(tmp_path):
  adapters = adapters_of({"q": [5, 4], "k": [5, 4], "s": [2, 5, 4]}, {"q": 2, "k": 1, "s": 1})
  write = lambda names, **more: export.peft(tmp_path / "x", adapters, names, 1.0, "base", **more)
  good = {"q": "a.q", "k": "a.k", "s": "s.{i}"}
  with pytest.raises(ValueError, match="no entry for the kernel 's'"):
    write({"q": "a", "k": "b"})
  with pytest.raises(ValueError, match="gives the name 'a.q' to two kernels"):
    write({**good, "k": "a.q"})
  with pytest.raises(ValueError, match="PEFT would confuse 'q' with 'a.q'"):
    write({**good, "k": "q"})
  with pytest.raises(ValueError, match='needs "{i}" for its layers'):
    write({**good, "s": "s"})
  # A [2, 5, 2] and B [2, 2, 4]: two layers, or one kernel of two input and two output axes.
  square = adapters_of({"s": [2, 5, 4]}, {"s": 2})
  with pytest.raises(ValueError, match=r'fit one kernel and those of several layers.*put "{i}"'):
    export.peft(tmp_path / "x", square, {"s": "s"}, 1.0, "base")
  with pytest.raises(
    ValueError, match="modules_to_save has 'a', but names has an adapter for 'a.[qk]'"
  ):
    write(good, modules_to_save={"a": {"weight": jnp.ones([2])}})
  with pytest.raises(ValueError, match=r'\["?\'?q.*has "{i}", but A \(5, 2\) and B \(2, 4\)'):
    write({**good, "q": "a.{i}.q"})
  with pytest.raises(TypeError, match="'base_model.model.head.w' must be an array.*got 'abc'"):
    write(good, modules_to_save={"head": {"w": "abc"}})
  with pytest.raises(TypeError, match="names must be a dict"):
    write("q")
  with pytest.raises(TypeError, match="base must be a text"):
    export.peft(tmp_path / "x", adapters, good, 1.0, "")
  for alpha in (float("nan"), float("inf")):
    with pytest.raises(ValueError, match="alpha must be finite; got"):
      export.peft(tmp_path / "x", adapters, good, alpha, "base")
  base = jax.tree.map(lambda _: None, {"q": 0})
  frozen = adapters | {"q": {"A": adapters["q"]["A"], "B": base["q"]}}
  with pytest.raises(ValueError, match="'B' of the kernel 'q' is None.*sm.merge"):
    export.peft(tmp_path / "x", frozen, good, 1.0, "base")
  with pytest.raises(ValueError, match="'[kqs]' has no 'A'"):
    export.peft(tmp_path / "x", lora.hold_A(adapters)[0], good, 1.0, "base")
  assert not list(tmp_path.iterdir())
  write(good)
  with pytest.raises(FileExistsError, match="Remove it, or write to another"):
    write(good)


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize("leaf", [jnp.ones([3], jnp.int4), KEY, jnp.tanh])
def test_what_safetensors_does_not_hold(tmp_path, leaf):
  params, adapters = {"w": jnp.zeros([5, 4]), "k": leaf}, adapters_of({"w": [5, 4]}, {"w": 2})
  with pytest.raises(TypeError, match="The tensor 'k' must be an array of a dtype that safe"):
    export.merged(tmp_path / "x", params, adapters)
  assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize(
  "names, more, message",
  (
    ({"w": None}, {}, r"the name in names\['w'\] must be a text"),
    ({"w": ("", (1, 0))}, {}, r"the name in names\['w'\] must be a text"),
    ({"w": ("w", (1, 1))}, {}, r"names\['w'\] has the permutation \(1, 1\).*each of \[0, 1\] once"),
    ({"w": ["w", [1]]}, {}, r"names\['w'\] has the permutation \[1\]; it must name each"),
    ({"w": ("w", 1)}, {}, r"names\['w'\] has the permutation 1; it must name each"),
    ({"w": ("w.{i}", (1, 0))}, {}, r"permutation \(1, 0\); it must name each of \[0\] once"),
    ({"w": "w"}, {"config": {"x": float("nan")}}, "config must be plain data"),
    ({"w": "w"}, {"alpha": float("inf")}, "alpha must be finite; got inf"),
  ),
)
def test_wrong_arguments_of_merged(tmp_path, names, more, message):
  params, adapters = {"w": jnp.zeros([5, 4])}, adapters_of({"w": [5, 4]}, {"w": 2})
  with pytest.raises((TypeError, ValueError), match=message):
    export.merged(tmp_path / "x", params, adapters, names, **more)
  assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("safetensors")
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  adapters = adapters_of({"q": [5, 4]}, {"q": 2})
  monkeypatch.setattr(export.json, "dumps", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export.peft(tmp_path / "x", adapters, {"q": "q"}, 1.0, "base")
  assert not list(tmp_path.iterdir())


def test_without_safetensors(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  adapters = adapters_of({"q": [5, 4]}, {"q": 2})
  with pytest.raises(ImportError, match="pip install safetensors"):
    export.peft(tmp_path / "x", adapters, {"q": "q"}, 1.0, "base")
  assert not list(tmp_path.iterdir())


def torch_and_friends():
  reason = "torch, transformers and peft are not installed: pip install -e '.[peft]'"
  return tuple(pytest.importorskip(m, reason=reason) for m in ("torch", "transformers", "peft"))


def torch_linear(weights, names, transposed):
  """{our path: kernel [in, out]} from a PyTorch model's weights."""
  arrays = {path: weights[name + ".weight"].detach().numpy() for path, name in names.items()}
  return {path: jnp.asarray(a.T if transposed else a) for path, a in arrays.items()}


def logits_of(torch, model, tokens):
  with torch.no_grad():
    return model(input_ids=torch.tensor(np.asarray(tokens))).logits.numpy()


def merged_logits(torch, model, kernels, adapters, names, alpha, transposed, tokens):
  """The logits of the model in which our merged kernels replace the weights."""
  merged = lora.merge(kernels, adapters, alpha)
  weights = dict(model.state_dict())
  for path, name in names.items():
    w = np.array(merged[path].T if transposed else merged[path])
    weights[name + ".weight"] = torch.tensor(w)
  model.load_state_dict(weights)
  return logits_of(torch, model, tokens)


def build(torch, transformers, kind):
  torch.manual_seed(0)
  if kind == "llama":
    config = transformers.LlamaConfig(
      vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=12,
      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()
  config = transformers.GPT2Config(
    vocab_size=50,
    n_embd=64,
    n_layer=12,
    n_head=4,
    n_positions=32,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
  )
  return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("alpha", [7.0, None])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_gives_equal_logits(kind, alpha, tmp_path, record_property):
  torch, transformers, peft = torch_and_friends()
  model = build(torch, transformers, kind)
  if kind == "llama":
    modules = [f"layers.{i}.self_attn.q_proj" for i in (0, 1, 11)]
    modules = [
      f"model.{m}" for m in [*modules, "layers.1.self_attn.v_proj", "layers.2.mlp.down_proj"]
    ]
  else:  # attn.c_proj, and not mlp.c_proj; layer 1, and not 11
    modules = ["h.1.attn.c_attn", "h.0.attn.c_proj", "h.2.mlp.c_fc"]
    modules = [f"transformer.{m}" for m in modules]
  names = {f"kernel_{n}": module for n, module in enumerate(modules)}
  transposed = kind == "llama"
  kernels = torch_linear(model.state_dict(), names, transposed)
  rules = {"kernel_0": 4, "kernel_2": 3, "kernel": 2}
  adapters = random_like(lora.init(KEY, kernels, rules))
  folder = export.peft(
    tmp_path / "task", adapters, names, alpha, kind, fan_in_fan_out=not transposed
  )
  tokens = np.arange(24).reshape(2, 12) * 7 % 50
  base = logits_of(torch, model, tokens)
  adapted = peft.PeftModel.from_pretrained(build(torch, transformers, kind), str(folder)).eval()
  loaded = {n for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
  assert loaded == {f"base_model.model.{m}" for m in modules}
  got = logits_of(torch, adapted, tokens)
  want = merged_logits(torch, model, kernels, adapters, names, alpha, transposed, tokens)
  difference = np.abs(got - want).max()
  record_property("difference of logits", float(difference))
  print(f"{kind}, alpha {alpha}: logits differ by {difference:.2g}, of {np.abs(want).max():.3g}")
  assert difference <= 1e-5
  assert np.abs(got - base).max() > 1e-2


def test_peft_convolution_and_a_saved_head(tmp_path):
  torch, _, peft = torch_and_friends()

  class Net(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.stem = torch.nn.Conv2d(3, 5, (3, 2), padding=1)
      self.head = torch.nn.Linear(5, 4)

    def forward(self, x):
      return self.head(torch.tanh(self.stem(x)).mean((2, 3)))

  torch.manual_seed(0)
  net = Net().eval()
  kernel = jnp.asarray(net.stem.weight.detach().numpy().transpose(2, 3, 1, 0))
  head = np.random.default_rng(0).normal(size=[4, 5]).astype(np.float32)
  adapters = random_like(lora.init(KEY, {"stem": kernel}, {"stem": 2}))
  folder = export.peft(
    tmp_path / "task", adapters, {"stem": "stem"}, 5.0, "net", task_type=None,
    modules_to_save={"head": {"weight": head, "bias": net.head.bias.detach().numpy()}},
  )  # fmt: skip
  x = torch.randn(2, 3, 6, 6)
  merged = np.array(lora.merge({"stem": kernel}, adapters, 5.0)["stem"].transpose(3, 2, 0, 1))
  with torch.no_grad():
    want_net = Net().eval()
    want_net.load_state_dict(
      net.state_dict() | {"stem.weight": torch.tensor(merged), "head.weight": torch.tensor(head)}
    )
    want = want_net(x).numpy()
    got = peft.PeftModel.from_pretrained(net, str(folder)).eval()(x).numpy()
  np.testing.assert_allclose(got, want, atol=1e-5)
