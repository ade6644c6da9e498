import dataclasses
import json

import numpy as np
import pytest

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.data.corpora import Corpus
from safemoe_jax.data.pipeline import encodable, epoch, pack, train_iterator
from safemoe_jax.errors import UserError

DOMAINS = ("apples", "pears", "plums")
LENGTH = 160


@pytest.fixture
def examples(make_example):
    sizes = np.random.default_rng(0).integers(1, 40, (60, 2))
    return [
        make_example(10 + i, DOMAINS[i % 3], f"q{i} " + "q" * q, f"a{i} " + "a" * a)
        for i, (q, a) in enumerate(sizes.tolist())
    ]


@pytest.fixture
def packed(tokenizer, examples, tmp_path):
    chat = ChatFormat(tokenizer)
    return pack(examples, chat, LENGTH, 0, streams=DOMAINS, directory=tmp_path)


def test_rows_hold_each_conversation_once_with_its_masks(tokenizer, examples, packed):
    chat = ChatFormat(tokenizer)
    by_id = {example.id: example for example in examples}
    seen = []
    for index in range(packed.num_rows):
        row = packed.row(index)
        ids = row["example_ids_BS"][row["example_ids_BS"] >= 0]
        seen += ids.tolist()
        for segment, example in enumerate((by_id[number] for number in ids), start=1):
            assert packed.streams[row["expert_ids_B"]] == example.domain
            (places,) = np.nonzero(row["segment_ids_BT"] == segment)
            encoded = chat.encode(example.messages, example.response)
            np.testing.assert_array_equal(np.diff(places), 1)
            np.testing.assert_array_equal(row["tokens_BT"][places], encoded.tokens)
            np.testing.assert_array_equal(row["targets_BT"][places], [*encoded.tokens[1:], 0])
            inside = np.arange(len(encoded.tokens))
            np.testing.assert_array_equal(row["positions_BT"][places], inside)
            np.testing.assert_array_equal(
                row["prompt_mask_BT"][places], inside < encoded.response_start
            )
            predicts = (inside + 1 >= encoded.response_start) & (inside < inside[-1])
            np.testing.assert_array_equal(row["loss_mask_BT"][places], predicts)
        padding = row["segment_ids_BT"] == 0
        for key in ("tokens_BT", "targets_BT", "loss_mask_BT", "prompt_mask_BT", "positions_BT"):
            assert not row[key][padding].any()
    assert sorted(seen) == sorted(by_id)


def test_packing_loses_no_loss_token(tokenizer, examples, packed):
    chat = ChatFormat(tokenizer)
    encoded = [chat.encode(example.messages, example.response) for example in examples]
    unpacked = sum(len(item.tokens) - item.response_start for item in encoded)
    assert sum(packed.row(i)["loss_mask_BT"].sum() for i in range(packed.num_rows)) == unpacked
    assert packed.tokens == (unpacked, sum(len(item.tokens) for item in encoded))
    assert packed.counts == {"examples": 60, "responses_cut": 0, "prompts_cut": 0}


@pytest.mark.parametrize(
    ("prompt", "response", "length", "kept", "counts"),
    [
        # The template's own tokens take 37 places of the prompt, the end of turn one of the answer.
        (1, 200, 100, (38, 62), (1, 0)),
        (80, 200, 100, (50, 50), (1, 1)),
        (80, 9, 100, (90, 10), (0, 1)),
    ],
)
def test_long_rows_lose_the_answers_end_then_the_prompts_left(
    tokenizer, make_example, tmp_path, prompt, response, length, kept, counts
):
    chat = ChatFormat(tokenizer)
    example = make_example(0, "apples", "q" * prompt, "a" * response)
    packed = pack([example], chat, length, 0, streams=None, directory=tmp_path)
    whole = chat.encode(example.messages, example.response)
    row = packed.row(0)
    start = whole.response_start
    expected = whole.tokens[start - kept[0] : start + kept[1]]
    np.testing.assert_array_equal(row["tokens_BT"], expected)
    assert row["prompt_mask_BT"].sum() == kept[0]
    assert row["loss_mask_BT"].sum() == kept[1]
    assert (packed.counts["responses_cut"], packed.counts["prompts_cut"]) == counts


def test_second_pack_reads_what_the_first_stored(tokenizer, examples, packed, tmp_path):
    class Deaf(ChatFormat):
        def encode_each(self, conversations):
            assert len(conversations) == 1, "only the probe may be tokenized again"
            return super().encode_each(conversations)

    again = pack(examples, Deaf(tokenizer), LENGTH, 0, streams=DOMAINS, directory=tmp_path)
    assert again.tokens == packed.tokens
    assert isinstance(again.flat_tokens, np.memmap)
    for index in range(packed.num_rows):
        np.testing.assert_array_equal(again.row(index)["tokens_BT"], packed.row(index)["tokens_BT"])
    pack(examples[1:], ChatFormat(tokenizer), LENGTH, 0, streams=DOMAINS, directory=tmp_path)
    assert len(list(tmp_path.glob("packed-*"))) == 2
    assert not list(tmp_path.glob("packing-*"))


@pytest.mark.parametrize("name", ["tokens.npy", "plan.npz", "counts.json", "sha256.json"])
def test_what_changed_on_the_disk_is_refused(tokenizer, examples, tmp_path, name):
    arguments = (examples, ChatFormat(tokenizer), LENGTH, 0)
    pack(*arguments, streams=DOMAINS, directory=tmp_path)
    (stored,) = tmp_path.glob("packed-*")
    content = bytearray((stored / name).read_bytes())
    content[-3] ^= 1
    (stored / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{stored} is damaged \(.*\); delete it"):
        pack(*arguments, streams=DOMAINS, directory=tmp_path)


@pytest.fixture
def no_system(tokenizer):
    """Of a base whose template knows no system turn, as Gemma's."""
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        + tokenizer.chat_template
    )
    return ChatFormat(tokenizer)


def corpus_of(examples):
    counts = {"rows": 70, "kept": len(examples), "dropped": {"duplicate": 10}}
    return Corpus(tuple(examples), counts, "0123", DOMAINS, source=None)


def with_system(example):
    turn = {"role": "system", "content": "secret"}
    return dataclasses.replace(example, messages=(turn, *example.messages))


def test_rows_that_the_template_refuses_are_left_out_and_counted(
    examples, no_system, tmp_path, monkeypatch, capsys
):
    odd = [with_system(e) if e.id in (12, 40) else e for e in examples]
    left = encodable(corpus_of(odd), no_system, tmp_path)
    assert left.examples == tuple(e for e in examples if e.id not in (12, 40))
    assert left.counts == {
        "rows": 70,
        "kept": 58,
        "dropped": {"duplicate": 10, "rejected: the chat template refuses its turns": 2},
    }
    (path,) = tmp_path.glob("unencodable-*.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": number, "reason": "the chat template refuses its turns"} for number in (12, 40)
    ]
    said = capsys.readouterr().out
    assert f"2 rows left out by the chat template; id and reason: {path}" in said
    assert pack(left.examples, no_system, LENGTH, 0, streams=DOMAINS, directory=tmp_path).num_rows

    monkeypatch.setattr(ChatFormat, "encode_each", lambda *_: pytest.fail("looked for again"))
    assert encodable(corpus_of(odd), no_system, tmp_path) == left


def test_a_domain_of_which_the_template_takes_nothing_is_refused(examples, no_system, tmp_path):
    odd = [with_system(e) if e.domain == "pears" else e for e in examples]
    message = "template takes no row of 'pears'; .*refuses its turns': 20.*; write them in turns"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            encodable(corpus_of(odd), no_system, tmp_path)


def test_a_corpus_that_the_template_takes_stays_as_it_is(examples, no_system, tmp_path):
    assert encodable(corpus_of(examples), no_system, tmp_path) == corpus_of(examples)


def test_batches_hold_equally_many_rows_of_every_stream_in_order(packed):
    iterator = train_iterator(packed, 2, seed=0)
    batch = next(iterator)
    assert batch["expert_ids_B"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["tokens_BT"].shape == (6, LENGTH)
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "tokens_BT": "int32",
        "targets_BT": "int32",
        "loss_mask_BT": "float32",
        "prompt_mask_BT": "bool",
        "positions_BT": "int32",
        "segment_ids_BT": "int32",
        "expert_ids_B": "int32",
        "example_ids_BS": "int32",
    }


def test_each_epoch_of_a_stream_holds_its_rows_once_in_a_new_order(packed):
    rows = len(packed.plan.rows_of(1))
    iterator = train_iterator(packed, 1, seed=0)
    drawn = [tuple(next(iterator)["example_ids_BS"][1]) for _ in range(2 * rows)]
    first, second = drawn[:rows], drawn[rows:]
    assert len(set(first)) == rows and set(first) == set(second)
    assert first != second


def test_state_resumes_exactly_and_is_one_number(packed):
    whole = train_iterator(packed, 2, seed=0)
    for _ in range(7):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    assert state == {"next_index": 7}
    resumed = train_iterator(packed, 2, seed=0)
    next(resumed)
    resumed.set_state(state)
    for _ in range(5):
        expected, batch = next(whole), next(resumed)
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value)


def test_processes_share_the_same_batches_and_the_same_state(packed):
    alone = train_iterator(packed, 2, seed=0)
    places = ([0, 1, 4], [2, 3, 5])
    parts = [train_iterator(packed, 2, seed=0, places=held) for held in places]
    for _ in range(4):
        expected = next(alone)
        for part, held in zip(parts, places, strict=True):
            for key, value in next(part).items():
                np.testing.assert_array_equal(value, expected[key][held])
    assert [part.get_state() for part in parts] == [alone.get_state()] * 2


def test_rows_of_a_domain_do_not_depend_on_the_other_domains(tokenizer, examples, packed, tmp_path):
    chat = ChatFormat(tokenizer)
    pears = [example for example in examples if example.domain == "pears"]
    alone = pack(pears, chat, LENGTH, 0, streams=("pears",), directory=tmp_path)
    together, single = train_iterator(packed, 2, seed=0), train_iterator(alone, 2, seed=0)
    for _ in range(20):
        np.testing.assert_array_equal(next(together)["tokens_BT"][2:4], next(single)["tokens_BT"])


def test_another_seed_draws_other_rows(packed):
    first, other = (next(train_iterator(packed, 2, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first["tokens_BT"], other["tokens_BT"])


def test_epoch_holds_each_row_once_and_pads_the_last_batch(packed):
    batches = list(epoch(packed, 8))
    assert {batch["tokens_BT"].shape for batch in batches} == {(8, LENGTH)}
    rows = np.concatenate([batch["tokens_BT"] for batch in batches])
    for index in range(packed.num_rows):
        np.testing.assert_array_equal(rows[index], packed.row(index)["tokens_BT"])
    last = batches[-1]
    filled = packed.num_rows % 8
    assert filled and (last["example_ids_BS"][filled:] == -1).all()
    assert not last["segment_ids_BT"][filled:].any() and not last["loss_mask_BT"][filled:].any()


def test_one_stream_of_everything(tokenizer, examples, tmp_path):
    chat = ChatFormat(tokenizer)
    packed = pack(examples, chat, LENGTH, 0, streams=None, directory=tmp_path)
    assert packed.num_streams == 1
    assert next(train_iterator(packed, 3, seed=0))["expert_ids_B"].tolist() == [0, 0, 0]


def test_mistakes_are_named(tokenizer, examples, packed, tmp_path):
    chat = ChatFormat(tokenizer)
    with pytest.raises(UserError, match="no example to pack"):
        pack([], chat, LENGTH, 0, streams=DOMAINS, directory=tmp_path)
    grown = pack(examples, chat, LENGTH, 0, streams=(*DOMAINS, "figs"), directory=tmp_path)
    with pytest.raises(UserError, match="no training row of 'figs'"):
        train_iterator(grown, 1, seed=0)
