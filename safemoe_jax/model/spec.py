"""The shape of a base transformer: what a weight file says, and no more."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A Llama-family decoder.

    Shape letters used in the whole package:
      B batch, T tokens, S segments, D model, N query heads, K key/value heads, H head dim, F mlp,
      V vocabulary, E experts, R rank, L layers.

    Attributes:
      vocab_size: V.
      embed_dim: D.
      num_layers: L.
      num_heads: N.
      num_kv_heads: K, a divisor of N.
      head_dim: H.
      mlp_dim: F.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon inside RMSNorm.
      tie_embeddings: true where the output head is the embedding, transposed.
      max_positions: longest sequence the base was trained on, in tokens.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
