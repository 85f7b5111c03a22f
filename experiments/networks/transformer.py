"""A causal Transformer."""

import flax.linen as nn
import jax


class Transformer(nn.Module):
  """A pre-norm Transformer; a block is [causal self-attention, MLP of four times the width].

  Parameters: embed, positions, block_i, norm, head.

  Attributes:
    vocabulary: the number of tokens. Each position has as many outputs, the logits of the next
      token.
  """

  vocabulary: int
  width: int = 256
  blocks: int = 8
  heads: int = 8

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Return logits [N, L, vocabulary] of int [N, L]."""
    positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
    x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens) + positions
    for i in range(self.blocks):
      x = TransformerBlock(self.heads, name=f"block_{i}")(x)
    x = nn.LayerNorm(name="norm")(x)
    return nn.Dense(self.vocabulary, name="head")(x)


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); [N, L, width] -> [N, L, width]."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, causal = x.shape[-1], nn.make_causal_mask(x[..., 0])
    attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
    x = x + attention(nn.LayerNorm(name="norm_0")(x), mask=causal)
    hidden = nn.gelu(nn.Dense(4 * width, name="mlp_0")(nn.LayerNorm(name="norm_1")(x)))
    return x + nn.Dense(width, name="mlp_1")(hidden)
