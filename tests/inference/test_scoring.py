import dataclasses

import jax
import numpy as np
import pytest
from tiny import byte_tokenizer
from toys import EXPERTS, SPEC, forward, toy_model, toy_variables

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.lora import Routed

LENGTH = 160
TOKENIZER = byte_tokenizer()
MODEL = toy_model(
    spec=dataclasses.replace(SPEC, vocab_size=len(TOKENIZER), max_positions=512),
    experts=dataclasses.replace(EXPERTS, targets=("q", "down")),
)
VARIABLES = toy_variables(MODEL)
CHAT = ChatFormat(TOKENIZER)


def asks(text):
    return ({"role": "user", "content": text},)


PAIRS = [
    (asks("Do cats sleep?"), "Yes, all day long."),
    (asks("Do dogs bark?"), "Yes."),
    (asks("What do birds do? " * 4), "Some sing in the morning; others fly south."),
    (asks("Do fish?"), "No."),
    (asks("Do dogs bark?"), "Never at all."),
]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(MODEL, VARIABLES, Routed(), CHAT, LENGTH)


@pytest.fixture(scope="module")
def direct():
    """log p of each answer's tokens, one unpacked conversation a row."""
    items = [item.cut_to(LENGTH) for item in CHAT.encode_all(PAIRS)]
    tokens_BT = np.zeros((len(items), LENGTH), np.int32)
    places_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (len(items), 1))
    for row, item in enumerate(items):
        tokens_BT[row, : len(item.tokens)] = item.tokens
    batch = {
        "tokens_BT": tokens_BT,
        "positions_BT": places_BT,
        "segment_ids_BT": (places_BT < [[len(item.tokens)] for item in items]).astype(np.int32),
        "prompt_mask_BT": places_BT < [[item.response_start] for item in items],
    }
    logp_BTV = jax.nn.log_softmax(forward(MODEL, VARIABLES, batch, Routed())[0])
    rows = []
    for row, item in enumerate(items):
        places = np.arange(item.response_start, len(item.tokens))
        rows.append(np.asarray(logp_BTV)[row, places - 1, item.tokens[places]])
    return rows


def test_equals_the_log_softmax_of_each_conversation_alone(scorer, direct):
    found = scorer(PAIRS)
    assert [len(score) for score in found] == [len(answer) + 1 for _, answer in PAIRS]
    for score, expected in zip(found, direct, strict=True):
        assert score.dtype == np.float32
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-4)
    assert found[1][-1] != found[3][-1]  # end of turn is scored, too, in its own context


def test_order_is_the_callers(scorer):
    order = [3, 0, 4, 2, 1]
    expected = scorer(PAIRS)
    for index, score in zip(order, scorer([PAIRS[i] for i in order]), strict=True):
        np.testing.assert_allclose(score, expected[index], rtol=0, atol=1e-4)


def test_an_overlong_answer_is_scored_up_to_the_cut(scorer):
    messages, answer = PAIRS[0]
    long = answer + " And all night, too." * 20
    cut = CHAT.encode(messages, long).cut_to(LENGTH)
    (score,) = scorer([(messages, long)])
    assert len(score) == LENGTH - cut.response_start
    # What comes later changes nothing before it; the short answer's last token ends its turn.
    np.testing.assert_allclose(score[: len(answer)], scorer([PAIRS[0]])[0][:-1], rtol=0, atol=1e-4)


def test_nothing_to_score(scorer):
    assert scorer([]) == []
