import collections
import hashlib
import itertools

import numpy as np

from safemoe_jax.data import splits

LONG = "please tell me in some detail how a gardener keeps snails away from young lettuce plants"


def test_near_duplicates_share_a_group_and_others_do_not():
    prompts = [LONG, "something else", LONG + " now", LONG.replace("snails", "deer"), "snails"]
    assert splits.group(prompts).tolist() == [0, 1, 0, 0, 4]


def test_groups_are_closed_under_near_duplication():
    words = [f"word{i}" for i in range(40)]
    chain = [" ".join(words[i : i + 30]) for i in (0, 4, 8)]
    assert splits.group([chain[0], chain[2]]).tolist() == [0, 1]
    assert splits.group(chain).tolist() == [0, 0, 0]


def similarity(one: set, other: set) -> float:
    """Jaccard's."""
    return len(one & other) / len(one | other)


def test_groups_are_those_of_comparing_every_pair():
    rng = np.random.default_rng(0)
    prompts, pairs, near = [], [], []
    for _ in range(500):
        words = rng.integers(0, 5000, rng.integers(20, 60))
        changed = rng.choice(len(words), rng.integers(1, 8), replace=False)
        told = np.where(np.isin(np.arange(len(words)), changed), words + 5000, words)
        both = [list(map(str, each)) for each in (words, told)]
        word_pairs = [set(itertools.pairwise(each)) for each in both]
        if 0.68 <= (found := similarity(*word_pairs)) <= 0.85:
            prompts += map(" ".join, both)
            pairs += word_pairs
            near.append(found)
    assert sum(0.7 <= found < 0.78 for found in near) > 50 and min(near) < 0.7
    expected = list(range(len(prompts)))
    for old, new in itertools.combinations(range(len(prompts)), 2):
        if expected[old] != expected[new] and similarity(pairs[old], pairs[new]) >= 0.7:
            first, last = sorted((expected[old], expected[new]))
            expected = [first if group == last else group for group in expected]
    assert splits.group(prompts).tolist() == expected


def test_prompts_from_one_template_are_compared_once_each(monkeypatch):
    compared, alike = [], splits._alike

    def counted(one, other):
        compared.append(1)
        return alike(one, other)

    monkeypatch.setattr(splits, "_alike", counted)
    prompts = [f"{LONG} number {i}" for i in range(1200)]
    assert set(splits.group(prompts).tolist()) == {0}
    assert len(compared) == len(prompts) - 1


def test_short_prompts_have_groups_of_their_own():
    assert splits.group(["a", "b", "a b", "b a"]).tolist() == [0, 1, 2, 3]


def test_a_group_lies_in_one_split_and_order_does_not_matter():
    prompts = [f"{LONG} {i}" for i in range(20)] + [f"unlike {i} {i}" for i in range(20)]
    split = dict(zip(prompts, splits.split_of(prompts, splits.group(prompts)), strict=True))
    assert len({split[prompt] for prompt in prompts[:20]}) == 1
    turned = prompts[::-1]
    again = splits.split_of(turned, splits.group(turned))
    assert dict(zip(turned, again, strict=True)) == split


def test_split_is_read_from_the_first_eight_bytes_of_the_hash():
    for prompt in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        place = int(hashlib.sha256(prompt.encode()).hexdigest()[:16], 16) / 16**16
        expected = (
            "train"
            if place < 0.63
            else "validation"
            if place < 0.7
            else "judge"
            if place < 0.8
            else "test"
        )
        assert splits.split_of([prompt], splits.group([prompt])) == [expected]


def test_shares_are_the_stated_ones():
    prompts = [f"number {i}" for i in range(4000)]
    counts = collections.Counter(splits.split_of(prompts, splits.group(prompts)))
    shares = {split: round(count / 4000, 2) for split, count in counts.items()}
    for split, share in {"train": 0.63, "validation": 0.07, "judge": 0.1, "test": 0.2}.items():
        assert abs(shares[split] - share) <= 0.02
