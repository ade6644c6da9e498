"""What the data tests share: a tokenizer of bytes with a chat template."""

import pytest
from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from safemoe_jax.data.corpora import Example


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def make_example():
    """Builds an Example from what a test cares about."""

    def make(number: int, domain: str, prompt: str, response: str) -> Example:
        return Example(
            id=number,
            messages=({"role": "user", "content": prompt},),
            response=response,
            domain=domain,
            label="safe",
            source="test",
            split="train",
            informative=True,
            group=number,
        )

    return make
