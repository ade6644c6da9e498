import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.serving.text import TextStream

BYTES = ChatFormat(tiny.byte_tokenizer())


def metaspace(tokens):
    """A SentencePiece decoder, which drops the space before a text's first word."""
    vocabulary = {f"▁{word}": i for i, word in enumerate(("one", "two", "three"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁one"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer.decode(tokens)


def pieces(decode, tokens, stops=()):
    """All pieces, and how many tokens were read until it stopped."""
    stream, said = TextStream(decode, stops), []
    for count, token in enumerate(tokens, start=1):
        said.append(stream.add(token))
        if stream.stopped:
            return said, count
    return [*said, stream.end()], len(tokens)


def test_pieces_joined_are_the_text_of_all_tokens():
    """Random bytes: most are no UTF-8, and what is, is cut anywhere."""
    rng = random.Random(0)
    words = ["é", "日本", "🙂", "a b", "\n", "<|im_start|>"]
    for _ in range(200):
        tokens = []
        while len(tokens) < 30:
            word = BYTES.text_ids(rng.choice(words))
            tokens += word if rng.random() < 0.7 else [rng.randrange(3, 259)]
        assert "".join(pieces(BYTES.text, tokens)[0]) == BYTES.text(tokens)


def test_a_character_comes_whole_and_at_once():
    tokens = BYTES.text_ids("a🙂b")
    assert pieces(BYTES.text, tokens)[0] == ["a", "", "", "", "🙂", "b", ""]
    assert pieces(BYTES.text, tokens[:3])[0] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_decoder_that_drops_the_first_space_keeps_the_others():
    assert pieces(metaspace, [0, 1, 2, 1])[0] == ["one", " two", " three", " two", ""]


@pytest.mark.parametrize(
    "text, stops, said, read",
    [
        ("say no more", ["no"], ["s", "a", "y", " ", "", ""], 6),
        ("now or not", ["not"], ["", "", "now", " ", "o", "r", " ", "", "", ""], 10),
        ("aab", ["ab"], ["", "a", ""], 3),
        ("xyz", ["z", "yz"], ["x", "", ""], 3),
        ("no", ["not"], ["", "", "no"], 2),
    ],
)
def test_a_stop_string_and_what_is_behind_it_never_show(text, stops, said, read):
    assert pieces(BYTES.text, BYTES.text_ids(text), stops) == (said, read)


def test_random_stops_cut_where_the_whole_text_would_be_cut():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abé") for _ in range(12))
        stops = ["".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        said, read = pieces(BYTES.text, BYTES.text_ids(text), stops)
        # What is met first as the text grows; of two that end together, the one that begins first.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if not ends:
            assert "".join(said) == text
            continue
        begun = [text.find(stop) for stop in stops if stop in text[: min(ends)]]
        assert "".join(said) == text[: min(begun)]
        assert read == len(BYTES.text_ids(text[: min(ends)]))
