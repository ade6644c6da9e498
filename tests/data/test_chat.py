import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from safemoe_jax.data.chat import ChatFormat, Encoded, Unencodable, colored
from safemoe_jax.data.pipeline import pack
from safemoe_jax.errors import UserError

MESSAGES = ({"role": "user", "content": "Why is the sky blue?"},)


def test_only_the_answer_and_its_end_of_turn_carry_loss(tokenizer):
    encoded = ChatFormat(tokenizer).encode(MESSAGES, "It scatters light.")
    assert tokenizer.decode(encoded.tokens[encoded.response_start :]) == (
        "It scatters light.<|im_end|>"
    )
    assert encoded.tokens.dtype == np.int32


def test_prompt_is_what_generation_starts_from_with_the_default_system_prompt(tokenizer):
    chat = ChatFormat(tokenizer)
    prompt = chat.prompt_ids(MESSAGES)
    encoded = chat.encode(MESSAGES, "It scatters light.")
    assert encoded.tokens[: encoded.response_start].tolist() == prompt
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_earlier_answers_carry_no_loss(tokenizer):
    turns = (*MESSAGES, {"role": "assistant", "content": "Light."}, *MESSAGES)
    encoded = ChatFormat(tokenizer).encode(turns, "As I said.")
    assert tokenizer.decode(encoded.tokens[encoded.response_start :]) == "As I said.<|im_end|>"


def test_end_of_turn_is_the_token_that_closes_an_answer(tokenizer):
    assert ChatFormat(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_ends_before_what_a_template_writes_after_the_turn(tokenizer):
    # As Phi-3's: the end of the turn, a newline, and then the end of the text.
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}"
        "{{ eos_token }}{% endif %}"
    )
    chat = ChatFormat(tokenizer)
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.ends == {chat.end_of_turn, tokenizer.eos_token_id}
    encoded = chat.encode(MESSAGES, "It scatters light.")
    assert tokenizer.decode(encoded.tokens[encoded.response_start :]) == (
        "It scatters light.<|im_end|>"
    )


def test_added_tokens_of_an_answer_stay(tokenizer):
    # As Qwen3's template, which writes that nothing was thought.
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ message['content'] }}",
    )
    chat = ChatFormat(tokenizer)
    for answer in ("Light.", "</think>", ""):
        encoded = chat.encode(MESSAGES, answer)
        said = tokenizer.decode(encoded.tokens[encoded.response_start :])
        assert said == f"<think></think>{answer}<|im_end|>"


def test_white_space_round_an_answer_is_stripped(tokenizer):
    chat = ChatFormat(tokenizer)
    padded, plain = chat.encode(MESSAGES, "\n Light. \n"), chat.encode(MESSAGES, "Light.")
    assert padded.tokens.tolist() == plain.tokens.tolist()


def test_many_encode_like_one(tokenizer):
    chat = ChatFormat(tokenizer)
    pairs = [(MESSAGES, "Light."), (({"role": "user", "content": "Hello"},), "Good day.")]
    for pair, encoded in zip(pairs, chat.encode_all(pairs), strict=True):
        assert encoded.tokens.tolist() == chat.encode(*pair).tokens.tolist()
        assert encoded.response_start == chat.encode(*pair).response_start


def test_what_cannot_be_encoded_does_not_stop_the_others(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system: ' + "
        "messages[0]['content']) }}{% endif %}" + tokenizer.chat_template
    )
    chat = ChatFormat(tokenizer)
    system = ({"role": "system", "content": "secret"}, *MESSAGES)
    pairs = [(MESSAGES, "Light."), (system, "Light."), (MESSAGES, "Rain.")]
    first, refused, last = chat.encode_each(pairs)
    assert isinstance(first, Encoded) and isinstance(last, Encoded)
    assert last.tokens.tolist() == chat.encode(MESSAGES, "Rain.").tokens.tolist()
    assert isinstance(refused, Unencodable)
    assert refused.reason == "the chat template refuses its turns"
    with pytest.raises(UserError, match=r"refuses turns \['system', 'user'\]: no system"):
        chat.encode_all(pairs)


def test_an_answer_that_merges_with_the_prompt_is_told(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["aL"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [["a", "L"]]
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
    )
    chat = ChatFormat(merging)
    merged, apart = chat.encode_each([(MESSAGES, "Light."), (MESSAGES, "light.")])
    assert isinstance(merged, Unencodable)
    assert merged.reason == "its prompt has other tokens once the answer follows"
    assert merging.decode(apart.tokens[apart.response_start :]) == "light."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("", "no chat template"),
        (
            "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}",
            "every token would carry loss",
        ),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "no token would carry loss",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "the first 0 agree",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ({"tool_use": "{{ messages }}", "rag": "{{ messages }}"}, "refuses turns .*no default"),
    ],
)
def test_a_template_without_a_usable_mask_is_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        ChatFormat(tokenizer)


def test_preview_is_green_where_the_loss_is(tokenizer, make_example, tmp_path):
    examples = [make_example(3, "a", "Hello", "Bonjour à tous"), make_example(4, "a", "Bye", "Au")]
    packed = pack(examples, ChatFormat(tokenizer), 256, 0, streams=None, directory=tmp_path)
    text = colored(packed.row(0), tokenizer.decode)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert sorted(green) == ["Au<|im_end|>", "Bonjour à tous<|im_end|>"]
    assert sorted(re.findall(r"example (\d)", text.plain)) == ["3", "4"]
