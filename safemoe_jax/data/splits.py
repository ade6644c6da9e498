"""Splits by prompt: near-duplicate prompts form a group, and a hash decides each group's split."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasketch import MinHash, MinHashLSH
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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
_PERMUTATIONS = 128


def group(prompts: Sequence[str]) -> np.ndarray:
    """Groups near-duplicate prompts.

    Two prompts are near-duplicates where the Jaccard similarity of their sets of word pairs is at
    least 0.7: MinHash finds the candidates (Broder, 1997), the sets themselves decide. Groups are
    the connected components.

    Args:
      prompts: distinct prompts, folded by `rules.fold`.

    Returns:
      int64 [prompts], the index of the first prompt of each prompt's group.
    """
    shingles = [_shingles(prompt) for prompt in prompts]
    index = MinHashLSH(threshold=_SIMILARITY, num_perm=_PERMUTATIONS)
    pairs = []
    encoded = ([" ".join(shingle).encode() for shingle in sorted(each)] for each in shingles)
    sketches = MinHash.generator(encoded, num_perm=_PERMUTATIONS)
    for new, sketch in enumerate(
        track(sketches, total=len(prompts), description="group near-duplicate prompts")
    ):
        for old in sorted(index.query(sketch)):
            both = len(shingles[new] & shingles[old])
            if both >= _SIMILARITY * (len(shingles[new]) + len(shingles[old]) - both):
                pairs.append((old, new))
        index.insert(new, sketch, check_duplication=False)
    edges = np.array(pairs, np.int64).reshape(-1, 2).T
    size = len(prompts)
    graph = coo_array((np.ones(len(pairs)), tuple(edges)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


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


def _shingles(prompt: str) -> frozenset[tuple[str, ...]]:
    words = prompt.split()
    ends = range(max(len(words) - _SHINGLE_WORDS, 0) + 1)
    return frozenset(tuple(words[i : i + _SHINGLE_WORDS]) for i in ends)
