"""What the data tests share: a tokenizer of bytes with a chat template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safemoe_jax.data.corpora import Example

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special ones, and a template with a default system prompt."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]  # ids from 0, which is padding
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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
