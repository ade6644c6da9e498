from safemoe_jax.data.benign import benign_examples


def test_passages_are_dealt_once_and_as_many_as_asked_for():
    learnt = benign_examples("train", {"cats": 30, "dogs": 12})
    assert [example.domain for example in learnt] == ["cats"] * 30 + ["dogs"] * 12
    assert len({example.response for example in learnt}) == 42
    assert all(example.response.strip() for example in learnt)
    held_out = benign_examples("validation", {"cats": 5})
    assert len(held_out) == 5
    # A topic is in one split: its question, too.
    assert not {e.prompt for e in held_out} & {
        e.prompt for e in benign_examples("train", {"a": 999})
    }
    assert learnt == benign_examples("train", {"cats": 30, "dogs": 12})


def test_there_is_about_as_much_as_in_the_corpus_that_it_stands_for():
    everything = benign_examples("train", {"few": 5_000, "many": 15_000})
    assert sum(len(example.response) for example in everything) > 150_000
    domains = [example.domain for example in everything]
    assert domains.count("few") > 33
    assert abs(domains.count("many") - 3 * domains.count("few")) <= 3
    lengths = sorted(len(example.response) for example in everything)
    assert 500 < lengths[len(lengths) // 2] <= 1000
