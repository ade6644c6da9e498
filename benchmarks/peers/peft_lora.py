"""PEFT: one LoRA on equal rows. Arguments: gguf, batch.npz, dtype, rank, steps."""

import sys

import torch
from base import adamw_step, load, lora, report, rows, seconds_per_step
from peft import get_peft_model

gguf, path, dtype, rank, steps = sys.argv[1:]
model = get_peft_model(load(gguf, dtype), lora(rank, "qkv"))
batch = rows(path)
seconds = seconds_per_step(adamw_step(model), [batch], int(steps))
report(tokens_per_second=batch["input_ids"].numel() / seconds, threads=torch.get_num_threads())
