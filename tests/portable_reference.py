"""What the torch module of a portable model computes, for tests/weights/test_portable.py; needs
torch."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch


def module(directory: Path) -> ModuleType:
    """The module that lies in an export, imported from there as its user would."""
    spec = importlib.util.spec_from_file_location("safemoe_torch", directory / "safemoe_torch.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def generate(
    directory: Path, prompts: list[list[int]], new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy answers by `transformers`' own `generate`, with its cache, prompts padded on the left.

    Returns:
      tokens [B, T]; the logits [B, T, V] that chose them; gates [L, B, E] of the last but one.
    """
    model, _ = module(directory).load(directory)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
    mask_BT = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    out = model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=model.config.vocab_size,  # none, so that every answer has its full length
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    gates_LBE = model.safemoe.gates_LBTE[:, :, -1]
    tokens_BT = out.sequences[:, longest:]
    return tokens_BT.numpy(), torch.stack(out.logits, dim=1).numpy(), gates_LBE.numpy()


def read_in_parts(directory: Path, parts: list[list[int]]) -> None:
    """Reads one text in several passes, by one cache."""
    model, _ = module(directory).load(directory)
    cache = {}
    for part in parts:
        out = model(torch.tensor([part]), use_cache=True, **cache)
        # transformers 5.24 calls `cache` what was `past_key_values`.
        cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
