"""Shapes of bases by hub id, as their makers published them, for what needs no weights.

Source: the models' cards, and Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783,
table 3.
"""

import dataclasses

from safemoe_jax.model.spec import ModelSpec, RopeScaling

_LLAMA_31_8B = ModelSpec(
    vocab_size=128_256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_positions=131_072,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
_LLAMA_31_70B = dataclasses.replace(
    _LLAMA_31_8B, embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28_672
)
_LLAMA_32_1B = dataclasses.replace(
    _LLAMA_31_8B,
    embed_dim=2048,
    num_layers=16,
    head_dim=64,
    mlp_dim=8192,
    tie_embeddings=True,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)

PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
}
