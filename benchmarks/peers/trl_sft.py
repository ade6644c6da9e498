"""TRL's SFTTrainer with packing: one LoRA after the other, an epoch of each corpus.

Arguments: gguf corpus.npz rank dtype rows length. Without a flash-attention kernel, which CPUs
lack, its packing lets conversations of a row see each other; it is timed as it is.
"""

import os
import sys
import tempfile
import time

import numpy as np
from base import corpus, load, lora, report
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

gguf, path, rank, dtype, rows, length = sys.argv[1:]
tokens, offsets, starts, streams = corpus(path)
tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(gguf), gguf_file=os.path.basename(gguf))


def dataset(stream: int) -> Dataset:
    mine = np.flatnonzero(streams == stream)
    items = [tokens[offsets[i] : offsets[i + 1]].tolist() for i in mine]
    masks = [
        [int(place >= starts[i]) for place in range(len(item))]
        for i, item in zip(mine, items, strict=True)
    ]
    return Dataset.from_dict({"input_ids": items, "completion_mask": masks})


took = 0.0
for stream in sorted(set(streams.tolist())):
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=load(gguf, dtype),
            args=SFTConfig(
                output_dir=directory,
                packing=True,
                max_length=int(length),
                per_device_train_batch_size=int(rows),
                num_train_epochs=1,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=False,  # mixed precision; a bfloat16 base computes in bfloat16
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=dataset(stream),
            processing_class=tokenizer,
            peft_config=lora(rank, "qkvo"),
        )
        start = time.perf_counter()
        trainer.train()
        took += time.perf_counter() - start
report(examples_per_second=len(streams) / took)
