"""Text that knows nothing of harm, for experts that should learn only how one writes.

It is the Python reference as `pydoc` has it: long prose, in every Python, so nothing is fetched.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pydoc_data.topics import topics

from safemoe_jax.data import rules, splits
from safemoe_jax.data.corpora import Example
from safemoe_jax.data.splits import Split

_CHARACTERS = 1000  # about as long as a harmful answer of PyRIT's corpus


def benign_examples(split: Split, rows: Mapping[str, int]) -> list[Example]:
    """Passages of the reference as answers, dealt to domains.

    Which passages are whose has no meaning; no passage is in two domains or in two splits.

    Args:
      split: topics of another split are passed over.
      rows: how many each domain gets; where there are not that many, its share of what there is.
    """
    prompts = [rules.fold(_question(text)) for text in topics.values()]
    found = dict(zip(topics, splits.split_of(prompts, splits.group(prompts)), strict=True))
    question_of = {
        passage: _question(text)
        for name, text in topics.items()
        if found[name] == split
        for passage in _passages(text)
    }
    passages = sorted(question_of, key=lambda text: hashlib.sha256(text.encode()).digest())
    share = min(1.0, len(passages) / max(sum(rows.values()), 1))
    domains = [d for d, count in rows.items() for _ in range(max(1, int(count * share)))]
    return [
        Example(
            id=number,
            messages=({"role": "user", "content": question_of[passage]},),
            response=passage,
            domain=domain,
            label="safe",
            source="pydoc topics",
            split=split,
            informative=False,
            group=number,
        )
        for number, (domain, passage) in enumerate(zip(domains, passages, strict=False))
    ]


def _question(text: str) -> str:
    return f"What does the Python reference say about {text.strip().splitlines()[0]}?"


def _passages(text: str) -> Iterator[str]:
    """Whole paragraphs, some 1,000 characters of them at once, without the title."""
    passage = ""
    for paragraph in text.strip().split("\n\n")[1:]:
        if passage and len(passage) + len(paragraph) > _CHARACTERS:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip()
    if passage:
        yield passage


def version() -> str:
    """sha256 of the text, hex; another Python may have another."""
    return hashlib.sha256("".join(topics.values()).encode()).hexdigest()
