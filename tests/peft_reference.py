"""What the library PEFT computes, for the tests of weights/peft.py; needs torch and peft."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def logits(base: Path, adapter: Path | None, tokens: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of a model directory with an adapter directory, or without."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with _without_deprecations():
            model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


def save_adapter(base: Path, adapter: Path, **config) -> None:
    """An adapter of random weights, as `save_pretrained` writes it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    with _without_deprecations():
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        )
        model.save_pretrained(adapter)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """PEFT 0.21 reads what transformers 5 has renamed; a missing tensor still raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
