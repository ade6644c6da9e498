"""One GPU: MFU of both train steps and decoding against the memory bandwidth, at Llama's shapes.

    python benchmarks/gpu.py ours|peft llama32_1b|llama31_8b|tiny

Random weights in bfloat16; seven experts of rank 16 on q, k, v, o; rows of 2,048 tokens. `tiny` is
a rehearsal of the script on any machine, whose numbers mean nothing. MFU counts what the method
needs, as `MultiplyAdds` does: a frozen weight costs a matmul forward and one backward, what is
trained one more, and of attention the causal half counts.
"""

import argparse
import dataclasses
import functools
import math
from typing import Literal

import jax
import numpy as np
from common import table
from inputs import config, random_rows
from jax.sharding import NamedSharding, PartitionSpec
from ours import Training, decode_seconds, drawn, seconds

from safemoe_jax.model.flops import MultiplyAdds
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.weights.published import PUBLISHED

LLAMA_1B = PUBLISHED["meta-llama/Llama-3.2-1B-Instruct"]
SHAPES = {
    "llama32_1b": LLAMA_1B,
    "llama31_8b": PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"],
    "tiny": dataclasses.replace(
        LLAMA_1B, embed_dim=256, num_layers=2, head_dim=8, mlp_dim=512, vocab_size=512
    ),
}
ROWS = {"llama32_1b": 8, "llama31_8b": 2, "tiny": 1}
LENGTH, EXPERTS, RANK, NEW, STEPS = 2048, 7, 16, 256, 10
TARGETS = ("q", "k", "v", "o")
# bfloat16 FLOP/s without sparsity and bytes/s of memory, by a part of the card's name; from
# NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80 GB SXM.
CARDS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.04e12)}


def ours(name: str) -> None:
    spec = SHAPES[name]
    values = config(
        experts__rank=RANK,
        experts__targets=TARGETS,
        model__param_dtype="bfloat16",
        model__compute_dtype="bfloat16",
    )
    model = Transformer.from_config(values, spec)
    mesh = make_mesh(values.mesh)
    jax.set_mesh(mesh)
    params = jax.device_put(drawn(model, "params")["params"], NamedSharding(mesh, PartitionSpec()))
    batch = random_rows(ROWS[name], LENGTH, start=1, vocab_size=500, experts=EXPERTS)
    peak, bandwidth = card()
    mixture = jax.eval_shape(functools.partial(drawn, model, "experts", "router"))
    count = MultiplyAdds.of(model, {"params": params, **mixture})
    lines = []
    stages: tuple[Literal["experts", "router"], ...] = ("experts", "router")
    for stage in stages:
        training = Training(model, values, stage, params)
        took = seconds(functools.partial(training.run, batch), STEPS)
        speed = ROWS[name] * LENGTH / took
        mfu = count.train_step(stage, ROWS[name], LENGTH) / took / peak
        lines.append((f"{name}, {stage} step", f"{speed:.0f} tokens/s", f"MFU {100 * mfu:.1f} %"))
    variables = {"params": params, **drawn(model, "experts", "router")}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    for rows in (1, 32):
        took = decode_seconds(model, variables, np.ones((rows, 64), np.int32), NEW)
        share = weights / bandwidth / took
        lines.append(
            (
                f"{name}, decode, batch {rows}",
                f"{rows / took:.0f} tokens/s",
                f"{100 * share:.1f} % of the bandwidth bound",
            )
        )
    table(f"One GPU, {jax.devices()[0].device_kind}", ("what", "speed", "of the bound"), lines)


def card() -> tuple[float, float]:
    """FLOP/s and bytes/s of the card at hand; NaN, and so no share of them, for others."""
    kind = jax.devices()[0].device_kind
    return next((bound for name, bound in CARDS.items() if name in kind), (math.nan, math.nan))


def peft(name: str) -> None:
    """One LoRA on the same rows in PEFT, fused attention by torch's choice."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = SHAPES[name]
    shape = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.embed_dim,
        intermediate_size=spec.mlp_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        tie_word_embeddings=spec.tie_embeddings,
        max_position_embeddings=spec.max_positions,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = LlamaForCausalLM(shape)
    modules = [f"{target}_proj" for target in TARGETS]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def speed(rows: int) -> float:
        tokens = torch.randint(0, 500, (rows, LENGTH), device=device)

        def work():
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()

        return tokens.numel() / seconds(work, STEPS)

    rows, found = ROWS[name], None
    while found is None:
        try:
            found = speed(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            optimizer.zero_grad()
            rows //= 2  # in as many rows as it has memory for
    columns = ("what", "speed", "rows")
    table("PEFT, one LoRA", columns, [(name, f"{found:.0f} tokens/s", str(rows))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "peft"))
    parser.add_argument("shape", choices=SHAPES)
    arguments = parser.parse_args()
    {"ours": ours, "peft": peft}[arguments.side](arguments.shape)
