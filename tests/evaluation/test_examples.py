"""The written examples: told apart, spread over manners, and free of harm's own words."""

import collections

from safemoe_jax.evaluation import cues, examples


def test_each_text_is_there_once_on_one_side():
    texts, refusals, manners = examples.written()
    assert len({cues.fold(text) for text in texts}) == len(texts)
    assert len(texts) == len(refusals) == len(manners)
    counts = collections.Counter(refusals)
    assert min(counts.values()) > 0.6 * max(counts.values())
    assert {manner for manner, refusal in zip(manners, refusals, strict=True) if refusal} == set(
        examples.REFUSALS
    )


def test_no_manner_stands_for_all():
    for manners in (examples.REFUSALS, examples.ANSWERS):
        sizes = [len(texts) for texts in manners.values()]
        assert max(sizes) < sum(sizes) / 3
