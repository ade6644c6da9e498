import collections
import hashlib

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
