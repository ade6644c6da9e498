"""What the systems are asked: prompts of a benchmark, in a fixed order."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from safemoe_jax.data import rules, splits
from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation.prompt_sets import (
    BENIGN,
    GSM8K,
    HELD_OUT,
    LEFT_OUT,
    Named,
    Question,
    gsm8k,
    harmless_answers,
    questions,
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question of a benchmark.

    Attributes:
      id: stable name, unique in its benchmark and domain.
      benchmark: the benchmark's name.
      domain: harm category.
      messages: turns with "role" and "content"; the last is the user's.
      prefix: how the answer begins, put into the model's mouth; mostly empty.
      group: prompts of a benchmark that are not independent of each other share it.
      harmful: whether it asks for harm, so that a refusal is safe; else a refusal is over-refusal.
      refusal_only: its answers are judged by refusal alone (`rules.hazard`).
      safe_answers: human safe-informative answers.
      harmful_answers: human-judged harmful answers.
      benign_answers: answers to a harmless question.
      solution: the number that is right; None where there is no such thing.
    """

    id: str
    benchmark: str
    domain: str
    messages: tuple[dict[str, str], ...]
    group: int
    harmful: bool
    refusal_only: bool
    prefix: str = ""
    safe_answers: tuple[str, ...] = ()
    harmful_answers: tuple[str, ...] = ()
    benign_answers: tuple[str, ...] = ()
    solution: int | None = None


def held_out(
    examples: Sequence[Example], domains: Sequence[str], prompts_per_domain: int
) -> list[Prompt]:
    """The distinct conversations of examples that nobody was taught, domain by domain.

    Args:
      examples: of a split that trains nothing.
      domains: which domains, in which order.
      prompts_per_domain: how many of each at most; 0 takes all. Which ones does not depend on the
        order of `examples`: they are sorted by the hash of their text, so that near-duplicates,
        which stand together in the corpora, do not fill a small sample.
    """
    by_conversation: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
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
                    benchmark=HELD_OUT,
                    domain=domain,
                    messages=rows[0].messages,
                    group=rows[0].group,
                    harmful=True,
                    refusal_only=False,  # no corpus keeps such rows
                    safe_answers=tuple(r.response for r in rows if r.informative),
                    harmful_answers=tuple(r.response for r in rows if r.label == "unsafe"),
                )
            )
    return prompts


def left_out(examples: Sequence[Example], domain: str, prompts_per_domain: int) -> list[Prompt]:
    """A domain's conversations of all splits, for models that were trained without it.

    A prompt that is a near-duplicate of what another domain trains on is not asked.

    Args:
      examples: of all domains, without those that must not be asked (the judge's part).
      domain: the one that is left out.
      prompts_per_domain: as for `held_out`.
    """
    trained = {
        example.group
        for example in examples
        if example.domain != domain and example.split in ("train", "validation")
    }
    own = [
        example for example in examples if example.domain == domain and example.group not in trained
    ]
    asked = held_out(own, [domain], prompts_per_domain)
    return [dataclasses.replace(prompt, benchmark=LEFT_OUT) for prompt in asked]


def general_ability() -> list[Prompt]:
    """A hundred problems in words, and 150 harmless questions with answers that are read only."""
    problems = [
        _harmless(GSM8K, number, problem.text, solution=problem.answer)
        for number, problem in enumerate(gsm8k())
    ]
    read = [
        _harmless(BENIGN, number, question, benign_answers=(answer,))
        for number, (question, answer) in enumerate(harmless_answers())
    ]
    return problems + read


def _harmless(benchmark: str, number: int, text: str, **more: Any) -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(
        id=_digest(messages),
        benchmark=benchmark,
        domain=benchmark,
        messages=messages,
        group=number,
        harmful=False,
        refusal_only=False,
        **more,
    )


def ask(
    sets: Sequence[Named],
    taught: Collection[str],
    prompts_per_benchmark: int,
    fits: Callable[[Prompt], bool],
) -> tuple[list[Prompt], dict[str, dict[str, Any]]]:
    """The prompts of published sets that nothing here was taught.

    A prompt is left out where it, or a near-duplicate of it (`splits.group`), trained experts or
    router or taught the judge. A set that has harmful and benign prompts becomes two benchmarks,
    NAME_harmful and NAME_benign: what a refusal means differs.

    Args:
      sets: `prompt_sets.resolve`.
      taught: prompts of everything that models and judge learnt from.
      prompts_per_benchmark: how many of each at most; 0 takes all. Which ones does not depend on
        their order in the files: they are sorted by the hash of their text.
      fits: whether a prompt can be asked; others are left out.

    Returns:
      prompts, benchmark by benchmark, and what there is to know about each benchmark: license,
      expectation, how many prompts are asked and how many not, and why.

    Raises:
      UserError: where a set's files cannot be had or read.
    """
    prompts: list[Prompt] = []
    facts: dict[str, dict[str, Any]] = {}
    read = [(named, *questions(named)) for named in sets]
    group_of = _groups(taught, [each.text for _, found, _ in read for each in found])
    taken = {group_of[rules.fold(text)] for text in taught}
    for named, found, left in read:
        for harmful in sorted({question.harmful for question in found}, reverse=True):
            kind = "harmful" if harmful else "benign"
            mixed = not isinstance(named.set.harmful, bool)
            name = f"{named.name}_{kind}" if mixed else named.name
            mine = [question for question in found if question.harmful == harmful]
            new = [q for q in mine if group_of[rules.fold(q.text)] not in taken]
            free = [_prompt(question, name, group_of) for question in new]
            fitting = sorted(filter(fits, free), key=lambda prompt: prompt.id)
            asked = fitting[: prompts_per_benchmark or None]
            prompts += asked
            facts[name] = {
                "license": named.set.license,
                "expects": "refusal or a safe answer" if harmful else "an answer",
                "prompts": len(mine),
                "left_out_as_taught": len(mine) - len(new),
                "left_out_as_too_long": len(free) - len(fitting),
                "asked": len(asked),
                "by_refusal_alone": sum(prompt.refusal_only for prompt in asked),
                "rows_left_out": dict(left),
            }
    return prompts, facts


def _groups(*texts: Collection[str]) -> dict[str, int]:
    """The number of each folded text's group of near-duplicates."""
    folded = sorted({rules.fold(text) for part in texts for text in part})
    return dict(zip(folded, splits.group(folded).tolist(), strict=True))


def _prompt(question: Question, benchmark: str, group_of: dict[str, int]) -> Prompt:
    messages = ({"role": "user", "content": question.text},)
    return Prompt(
        id=_digest(messages),
        benchmark=benchmark,
        domain=question.domain,
        messages=messages,
        group=group_of[rules.fold(question.text)],
        harmful=question.harmful,
        refusal_only=question.refusal_only,
    )


def _digest(messages: Sequence[dict[str, str]]) -> str:
    text = "\n".join(f"{turn['role']}\t{turn['content']}" for turn in messages)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
