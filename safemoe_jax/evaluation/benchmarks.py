"""What the systems are asked: prompts of a benchmark, in a fixed order."""

import dataclasses
import hashlib
from collections.abc import Sequence

from safemoe_jax.data.corpora import Example


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question of a benchmark.

    Attributes:
      id: stable name, unique in its benchmark.
      benchmark: the benchmark's name.
      domain: harm category.
      messages: turns with "role" and "content"; the last is the user's.
      group: prompts that are not independent of each other share it.
      safe_answers: human safe-informative answers.
      harmful_answers: human-judged harmful answers.
    """

    id: str
    benchmark: str
    domain: str
    messages: tuple[dict[str, str], ...]
    group: int
    safe_answers: tuple[str, ...]
    harmful_answers: tuple[str, ...]


def held_out(
    examples: Sequence[Example], domains: Sequence[str], prompts_per_domain: int
) -> list[Prompt]:
    """The distinct conversations of the test split, domain by domain.

    Args:
      examples: any examples; those of another split are passed over.
      domains: which domains, in which order.
      prompts_per_domain: how many of each at most; 0 takes all. Which ones does not depend on the
        order of `examples`: they are sorted by the hash of their text, so that near-duplicates,
        which stand together in the corpora, do not fill a small sample.
    """
    by_conversation: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        if example.split == "test":
            key = (example.domain, _digest(example.messages))
            by_conversation.setdefault(key, []).append(example)

    prompts = []
    for domain in domains:
        digests = sorted(digest for name, digest in by_conversation if name == domain)
        for digest in digests[: prompts_per_domain or None]:
            rows = by_conversation[domain, digest]
            prompts.append(
                Prompt(
                    id=digest,
                    benchmark="held_out",
                    domain=domain,
                    messages=rows[0].messages,
                    group=rows[0].group,
                    safe_answers=tuple(r.response for r in rows if r.informative),
                    harmful_answers=tuple(r.response for r in rows if r.label == "unsafe"),
                )
            )
    return prompts


def _digest(messages: Sequence[dict[str, str]]) -> str:
    text = "\n".join(f"{turn['role']}\t{turn['content']}" for turn in messages)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
