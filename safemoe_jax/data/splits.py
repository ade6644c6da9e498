"""Splits by prompt: near-duplicate prompts form a group, and a hash decides each group's split."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasketch import MinHash, MinHashLSH
from scipy.cluster.hierarchy import DisjointSet

from safemoe_jax.progress import track

Split = Literal["train", "validation", "judge", "test"]

# Upper ends on the unit interval: models 70 % (a tenth of it validation), judge 10 %, test 20 %.
_ENDS: tuple[tuple[float, Split], ...] = (
    (0.63, "train"),
    (0.70, "validation"),
    (0.80, "judge"),
    (1.00, "test"),
)
_SIMILARITY = 0.7
_SHINGLE_WORDS = 2
# A pair of similarity s is a candidate with probability 1 - (1 - s^4)^32: 0.9998 at 0.7. Such
# short bands propose many that are less alike, which cost a comparison; a missed one costs a split.
_BANDS = (32, 4)
_PERMUTATIONS = 128

Shingles = frozenset[tuple[str, ...]]


def group(prompts: Sequence[str]) -> np.ndarray:
    """Groups near-duplicate prompts.

    Two prompts are near-duplicates where the Jaccard similarity of their sets of word pairs is at
    least 0.7: MinHash finds the candidates (Broder, 1997), the sets themselves decide. Groups are
    the connected components; within one nothing is compared any more.

    Args:
      prompts: distinct prompts, folded by `rules.fold`.

    Returns:
      int64 [prompts], the index of the first prompt of each prompt's group.
    """
    shingles = [_shingles(prompt) for prompt in prompts]
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
    groups = DisjointSet(range(len(prompts)))
    encoded = ([" ".join(shingle).encode() for shingle in sorted(each)] for each in shingles)
    sketches = MinHash.generator(encoded, num_perm=_PERMUTATIONS)
    for new, sketch in enumerate(
        track(sketches, total=len(prompts), description="group near-duplicate prompts")
    ):
        for old in index.query(sketch):
            if groups[old] != groups[new] and _alike(shingles[old], shingles[new]):
                groups.merge(old, new)
        index.insert(new, sketch, check_duplication=False)
    first: dict[int, int] = {}
    places = [first.setdefault(groups[place], place) for place in range(len(prompts))]
    return np.array(places, np.int64)


def _alike(one: Shingles, other: Shingles) -> bool:
    both = len(one & other)
    return both >= _SIMILARITY * (len(one) + len(other) - both)


def split_of(prompts: Sequence[str], groups: np.ndarray) -> list[Split]:
    """The split of each prompt: that of its group's alphabetically first prompt.

    Args:
      prompts: distinct prompts, folded by `rules.fold`.
      groups: what `group` returns for them.
    """
    leaders: dict[int, str] = {}
    for prompt, number in zip(prompts, groups.tolist(), strict=True):
        leaders[number] = min(prompt, leaders.get(number, prompt))
    return [_hash_split(leaders[number]) for number in groups.tolist()]


def _hash_split(prompt: str) -> Split:
    """Reads the first 8 bytes of the prompt's sha256 as a place on the unit interval."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    return next(split for end, split in _ENDS if place < end or end == 1)


def _shingles(prompt: str) -> Shingles:
    words = prompt.split()
    ends = range(max(len(words) - _SHINGLE_WORDS, 0) + 1)
    return frozenset(tuple(words[i : i + _SHINGLE_WORDS]) for i in ends)
