"""The Llama network equals that of transformers; its adapters go from JAX to PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks import llama
from shrinkmeta.adapters import export, lora
from tests.adapters.networks import random_like

SIZES = dict(
  vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
  num_key_value_heads=2,
)  # fmt: skip
DOCUMENT = SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6}
LLAMA3 = dict(
  rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16,
)  # fmt: skip
TOKENS = np.arange(24).reshape(2, 12) * 7 % 50
RULES = {"(q|v)_proj": 2, "down_proj": 3}


def test_later_tokens_change_no_earlier_logits():
  config = llama.config_of(DOCUMENT)
  params = llama.init(jax.random.key(0), config, scale=0.3)
  other = TOKENS.copy()
  other[:, 8:] = 3
  one, two = llama.apply(config, params, TOKENS), llama.apply(config, params, other)
  np.testing.assert_allclose(one[:, :8], two[:, :8], atol=1e-5)
  assert jnp.abs(one[:, 8:] - two[:, 8:]).max() > 0.1


def test_attention_sees_differences_of_positions_only():
  config = llama.config_of(DOCUMENT | {"rope_parameters": LLAMA3})
  frequencies = llama.frequencies(config)
  q, k = jax.random.normal(jax.random.key(0), [2, 1, 1, 1, config.head_dim])
  at = lambda x, position: llama.rotate(x, position * frequencies[None])
  products = [jnp.sum(at(q, p + 3.0) * at(k, 1.0 * p)) for p in (0, 5, 11)]
  np.testing.assert_allclose(products, products[0], atol=1e-5)


def test_attached_equals_merged():
  config = llama.config_of(DOCUMENT)
  params = llama.init(jax.random.key(0), config, scale=0.3)
  predict = lambda params, tokens: llama.apply(config, params, tokens)
  adapters = random_like(lora.init(jax.random.key(1), params, RULES))
  got = jax.jit(lora.attach(predict, 4.0))(lora.split_layers(adapters), TOKENS, params)
  want = predict(lora.merge(params, adapters, 4.0), TOKENS)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  with pytest.raises(ValueError, match="'embed' enters the operation `gather`"):
    rules = {"embed": 2}
    lora.attach(predict)(lora.init(jax.random.key(1), params, rules), TOKENS, params)


@pytest.mark.parametrize(
  "wrong", [{"attention_bias": True}, {"hidden_act": "gelu"}, {"rope_scaling": {"type": "yarn"}}]
)
def test_models_that_it_cannot_read(wrong):
  with pytest.raises(ValueError, match="config.json: .* must be"):
    llama.config_of(DOCUMENT | wrong)


def test_weights_written_are_weights_read(tmp_path):
  pytest.importorskip("safetensors", reason="safetensors is not installed")
  config = llama.config_of(DOCUMENT)
  params = llama.init(jax.random.key(0), config)
  nothing = lora.init(jax.random.key(1), params, RULES)  # B = 0
  write = lambda folder, params, document: export.merged(
    tmp_path / folder, params, nothing, llama.names(config), config=document
  )
  found, read = llama.read(write("a", params, DOCUMENT))
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, read, params)
  with pytest.raises(ValueError, match="lacks 'model.layers.3.input_layernorm.weight'"):
    llama.read(write("b", params, DOCUMENT | {"num_hidden_layers": 4}))
  with pytest.raises(ValueError, match="tensors that this network lacks.*model.layers.2"):
    llama.read(write("c", params, DOCUMENT | {"num_hidden_layers": 2}))
  with pytest.raises(ValueError, match="has shapes .*; config.json wants"):
    llama.read(write("d", params, DOCUMENT | {"intermediate_size": 40}))


def torch_and_friends():
  reason = "torch, transformers and peft are not installed: pip install -e '.[peft]'"
  return tuple(pytest.importorskip(m, reason=reason) for m in ("torch", "transformers", "peft"))


def torch_logits(torch, model):
  with torch.no_grad():
    return model.eval()(input_ids=torch.tensor(TOKENS)).logits.numpy()


def saved_model(folder, **more):
  torch, transformers, _ = torch_and_friends()
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**SIZES, initializer_range=0.2, **more)
  )
  for name, weight in model.named_parameters():
    if "norm" in name:
      torch.nn.init.uniform_(weight, 0.5, 1.5)
  model.save_pretrained(folder)
  return model


@pytest.mark.parametrize(
  "more", [{}, {"tie_word_embeddings": True, "head_dim": 16}, {"rope_parameters": LLAMA3}]
)
def test_logits_equal_those_of_transformers(more, tmp_path):
  torch, *_ = torch_and_friends()
  model = saved_model(tmp_path, **more)
  config, params = llama.read(tmp_path)
  got, want = llama.apply(config, params, TOKENS), torch_logits(torch, model)
  print(f"logits differ by {np.abs(got - want).max():.2g}, of {np.abs(want).max():.3g}")
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_adapters_travel_to_peft_and_to_transformers(tmp_path):
  torch, transformers, peft = torch_and_friends()
  model = saved_model(tmp_path / "base")
  config, params = llama.read(tmp_path / "base")
  predict = lambda params, tokens: llama.apply(config, params, tokens)
  adapters = random_like(lora.init(jax.random.key(1), params, RULES))
  want = lora.attach(predict, 4.0)(adapters, TOKENS, params)
  folder = export.peft(tmp_path / "task", adapters, llama.modules(), 4.0, str(tmp_path / "base"))
  whole = export.merged(
    tmp_path / "whole", params, adapters, llama.names(config), 4.0, model.config.to_dict()
  )
  of_whole = torch_logits(torch, transformers.AutoModelForCausalLM.from_pretrained(whole))
  of_peft = torch_logits(torch, peft.PeftModel.from_pretrained(model, str(folder)))
  for name, got in {"peft": of_peft, "merged": of_whole}.items():
    print(f"{name}: logits differ by {np.abs(got - want).max():.2g}, of {np.abs(want).max():.3g}")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.abs(of_peft - llama.apply(config, params, TOKENS)).max() > 0.1
