"""transformers: greedy generation by the bare base. Arguments: gguf, prompts.npz, new, dtype."""

import sys
import time

import numpy as np
import torch
from base import load, report

gguf, path, new, dtype = sys.argv[1:]
model = load(gguf, dtype).eval()
with np.load(path) as file:
    tokens, mask = (torch.tensor(file[key], dtype=torch.long) for key in ("tokens", "mask"))


def generate(count: int) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,  # no answer ends early: the work is known
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == tokens.shape[1] + count
    return time.perf_counter() - start


generate(2)
prefill = generate(1)
seconds = generate(int(new)) - prefill
report(tokens_per_second=len(tokens) * (int(new) - 1) / seconds, prefill_seconds=prefill)
