"""What the peers' sides share; runs in their venvs, knows nothing of this project."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

torch.manual_seed(0)


def load(gguf: str, dtype: str):
    """The base through transformers' own GGUF reader, its weights then in plain linear layers.

    The reader may keep weights packed and unpack them in every matmul, which is slower.
    """
    path = Path(gguf)
    packed = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model


def lora(rank: str, targets: str, **more):
    """A LoRA on the named projections, such as "qkv", scaled by 2 as ours is."""
    from peft import LoraConfig  # not every peer's venv has it

    return LoraConfig(
        r=int(rank),
        lora_alpha=2 * int(rank),
        target_modules=[f"{target}_proj" for target in targets],
        task_type="CAUSAL_LM",
        **more,
    )


def corpus(path: str) -> tuple[np.ndarray, ...]:
    """Tokens of all conversations, where each begins, where its answer begins, and its domain."""
    with np.load(path) as file:
        return tuple(file[key] for key in ("tokens", "offsets", "starts", "streams"))


def seconds_per_step(step, batches, steps: int) -> float:
    """Mean time of `steps` calls of `step(batch)` after one that warms up."""
    step(batches[0])
    start = time.perf_counter()
    for index in range(steps):
        step(batches[index % len(batches)])
    return (time.perf_counter() - start) / steps


def adamw_step(model, rate: float = 1e-4):
    """One step of AdamW on what the model lets be trained, gradients clipped at 1."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    model.train()

    def step(batch):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def rows(path: str) -> dict[str, torch.Tensor]:
    """A batch of full rows: input ids and labels, -100 where no loss is."""
    with np.load(path) as file:
        tokens = torch.tensor(file["tokens_BT"], dtype=torch.long)
        # The library shifts labels itself: label t is predicted at t - 1.
        carries = torch.tensor(file["loss_mask_BT"] > 0).roll(1, dims=1)
        carries[:, 0] = False
        return {"input_ids": tokens, "labels": torch.where(carries, tokens, -100)}


def report(**result) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**result, "peak_bytes": peak}))
