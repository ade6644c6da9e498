"""Judges that are models asked by a template, at an endpoint or on this machine's devices.

    evaluation.judges = ("wildguard#allenai/wildguard", "llama_guard_3@local#models/Llama-Guard-3")

What is asked and replied is kept line by line in a file of its owner's alone, by content: nothing
is asked twice, also not after a kill.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.judge_templates import NAMES, Reply, Template, load_template
from safemoe_jax.evaluation.likelihood import Messages
from safemoe_jax.evaluation.verdicts import MISSING, Verdict, content_key
from safemoe_jax.private_files import append_json, read_json_lines
from safemoe_jax.progress import console

KEY_VARIABLE = "SAFEMOE_JUDGE_API_KEY"
LOCAL = "local"
_LOOPBACK_URL = "http://localhost:8000/v1"  # where vLLM listens

Row = dict[str, Any]
Texts = tuple[str, str]  # a prompt and its answer


@dataclasses.dataclass(frozen=True)
class Asked:
    """One of `evaluation.judges`: TEMPLATE[@PLACE]#MODEL.

    Attributes:
      template: what is asked.
      place: an endpoint's URL, or `LOCAL`.
      model: its name there; at `LOCAL` whatever `config.model.source` may be.
    """

    template: Template
    place: str
    model: str

    @property
    def name(self) -> str:
        return self.template.name

    @property
    def is_local(self) -> bool:
        return self.place == LOCAL


def parse_judges(texts: Sequence[str]) -> list[Asked]:
    """Reads `evaluation.judges`.

    Raises:
      UserError: on a text of another form, an unknown template or one that is not read locally, a
        URL that holds a password, or a template that is named twice.
    """
    judges = [_parse(text) for text in texts]
    names = [judge.name for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"config.evaluation.judges names {twice[0]} twice; name each judge once")
    return judges


def _parse(text: str) -> Asked:
    where, _, model = text.partition("#")
    name, _, place = where.partition("@")
    if place == LOCAL and model:
        return _local(name, model)
    url = (place or _LOOPBACK_URL).rstrip("/")
    try:
        parts = urlsplit(url)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if not model or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"config.evaluation.judges has {text!r}; write TEMPLATE#MODEL or TEMPLATE@URL#MODEL, "
            f"such as wildguard@{_LOOPBACK_URL}#allenai/wildguard, or TEMPLATE@{LOCAL}#DIRECTORY"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"the URL of judge {name} holds more than an address; put a key into ${KEY_VARIABLE}"
        )
    return Asked(load_template(name), url, model)


def _local(name: str, model: str) -> Asked:
    template = load_template(name)
    if template.logprobs:
        others = [other for other in NAMES if not load_template(other).logprobs]
        raise UserError(
            f"judge {name} is read by probabilities, which only an endpoint gives: name its URL; "
            f"at {LOCAL!r} there are {', '.join(others)}"
        )
    return Asked(template.as_weights_have_it, LOCAL, model)


class AskedJudge(abc.ABC):
    """Its verdicts know what the template asks for and no more."""

    def __init__(self, asked: Asked, directory: Path) -> None:
        """Asks nothing yet.

        Args:
          asked: what is asked, and whom.
          directory: of the file with all that was asked and replied, judge_NAME.jsonl.
        """
        self.name = asked.name
        self.asked = asked
        self.reliability: dict[str, dict[str, Any]] = {}
        self.unreadable = 0  # replies that could not be read, those that were asked again included
        self.path = directory / f"judge_{asked.name}.jsonl"

    @abc.abstractmethod
    def check(self) -> None:
        """Finds what would fail, before hours of generating.

        Raises:
          UserError: where it would.
        """

    def judge(self, pairs: Sequence[tuple[Messages, str]]) -> list[Verdict]:
        """One verdict for each pair; what is on file is not asked again.

        Raises:
          UserError: where nobody replies any more; what was replied until then is kept.
        """
        texts = [(messages[-1]["content"], answer) for messages, answer in pairs]
        identity = (self.name, self.asked.template.sha256, *self._who)
        keys = [content_key(*text, *identity) for text in texts]
        known = {row["key"]: row for row in read_json_lines(self.path)}
        if todo := {key: text for key, text in zip(keys, texts, strict=True) if key not in known}:
            self._ask_and_keep(todo, known)
        self.unreadable = sum(
            self.asked.template.parse(replies) is None
            for key in dict.fromkeys(keys)
            for replies in _tries(known.get(key))
        )
        return [self._verdict(known.get(key)) for key in keys]

    def _ask_and_keep(self, todo: Mapping[str, Texts], known: dict[str, Row]) -> None:
        """Asks, and keeps each reply as it comes, on file and in `known`."""

        def keep(row: Row) -> None:
            append_json(self.path, row)
            known[row["key"]] = row

        if refused := self._ask(todo, keep):
            count = len(todo.keys() - known.keys())
            console.print(
                f"judge {self.name}: {count} of {len(todo)} texts were refused, as: {refused}"
            )
            if not known:
                raise UserError(f"judge {self.name}: {self._place} refuses all texts: {refused}")

    @abc.abstractmethod
    def _ask(self, todo: Mapping[str, Texts], keep: Callable[[Row], None]) -> str:
        """Asks about texts, by key, and gives `keep` what `_row` makes of the replies.

        Returns:
          why texts were refused, such as being too long; "" where none was.

        Raises:
          UserError: where nobody replies any more.
        """

    @property
    @abc.abstractmethod
    def _who(self) -> tuple[str, ...]:
        """What tells whoever replies from any other."""

    @property
    @abc.abstractmethod
    def _place(self) -> str:
        """Whoever replies, in messages."""

    def _row(
        self, key: str, texts: Texts, requests: Sequence[Any], replies: Sequence[Sequence[Reply]]
    ) -> Row:
        """A row of the file.

        Args:
          key: of the texts.
          texts: prompt and answer.
          requests: what was sent.
          replies: to each of them; all are sent again where a reply cannot be read.
        """
        template, (prompt, answer) = self.asked.template, texts
        return {
            "key": key,
            "model": self.asked.model,
            "template": template.name,
            "template_sha256": template.sha256,
            "prompt": prompt,
            "answer": answer,
            "requests": requests,
            "replies": [[dataclasses.asdict(reply) for reply in tried] for tried in replies],
        }

    def _verdict(self, row: Mapping[str, Any] | None) -> Verdict:
        tries = _tries(row)
        return (self.asked.template.parse(tries[-1]) if tries else None) or MISSING


def _tries(row: Mapping[str, Any] | None) -> list[list[Reply]]:
    return [[Reply(**reply) for reply in replies] for replies in row["replies"]] if row else []
