"""PEFT's X-LoRA over random LoRA adapters: layerwise scalings, one linear layer as classifier.

Arguments: train gguf batch.npz EXPERTS RANK STEPS | generate gguf prompts.npz EXPERTS RANK NEW
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from base import adamw_step, load, lora, report, rows, seconds_per_step
from peft import XLoraConfig, get_peft_model

what, gguf, path, experts, rank, count = sys.argv[1:]
experts, count = int(experts), int(count)


def adapters(directory: str) -> dict[str, str]:
    """`experts` adapters on q, k and v, with B away from zero, as trained ones have it."""
    model = get_peft_model(load(gguf, "float32"), lora(rank, "qkv", init_lora_weights=False))
    paths = {}
    for index in range(experts):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.01)
        paths[str(index)] = str(Path(directory) / str(index))
        model.save_pretrained(paths[str(index)])
    return paths


with tempfile.TemporaryDirectory() as directory:
    base = load(gguf, "float32")
    base.config.use_cache = False  # X-LoRA refuses a base that caches
    model = get_peft_model(
        base,
        XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            xlora_depth=1,
            layerwise_scalings=True,
            adapters=adapters(directory),
        ),
    )

if what == "train":
    batch = rows(path)
    seconds = seconds_per_step(adamw_step(model), [batch], count)
    scalings = experts * base.config.num_hidden_layers
    report(tokens_per_second=batch["input_ids"].numel() / seconds, scalings=scalings)
else:
    model.eval()
    with np.load(path) as file:
        tokens, mask = (torch.tensor(file[key], dtype=torch.long) for key in ("tokens", "mask"))

    def generate(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    generate(1)
    first = generate(1)
    report(tokens_per_second=len(tokens) * (count - 1) / (generate(count) - first))
