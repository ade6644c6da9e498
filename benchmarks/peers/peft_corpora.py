"""PEFT on the real corpora: one LoRA after the other, batches padded to their longest conversation.

Arguments: gguf corpus.npz rank dtype batch_size. Loss on answers alone, as ours.
"""

import sys
import time

import numpy as np
import torch
from base import adamw_step, corpus, load, lora, report
from peft import get_peft_model

gguf, path, rank, dtype, size = sys.argv[1:]
size = int(size)
config = lora(rank, "qkvo")
tokens, offsets, starts, streams = corpus(path)


def padded(indices) -> dict[str, torch.Tensor]:
    items = [torch.tensor(tokens[offsets[i] : offsets[i + 1]], dtype=torch.long) for i in indices]
    longest = max(map(len, items))
    ids = torch.zeros((len(items), longest), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (item, index) in enumerate(zip(items, indices, strict=True)):
        ids[row, : len(item)], mask[row, : len(item)] = item, 1
        labels[row, starts[index] : len(item)] = item[starts[index] :]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


model = get_peft_model(load(gguf, dtype), config, adapter_name="warm_up")
adamw_step(model)(padded(range(2)))
took = 0.0
for stream in sorted(set(streams.tolist())):
    model.add_adapter(str(stream), config)
    model.set_adapter(str(stream))
    step = adamw_step(model)
    mine = np.flatnonzero(streams == stream)
    np.random.default_rng(stream).shuffle(mine)
    start = time.perf_counter()
    for at in range(0, len(mine), size):
        step(padded(mine[at : at + size]))
    took += time.perf_counter() - start
report(examples_per_second=len(streams) / took)
