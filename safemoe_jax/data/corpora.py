"""Corpora: labelled conversations."""

import dataclasses
from typing import Literal

Label = Literal["unsafe", "safe"]
Split = Literal["train", "validation", "judge", "test"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation with its answer.

    Attributes:
      id: the row's place in the source, the same whatever the settings.
      messages: turns with "role" and "content"; the last is the user's.
      response: the answer.
      domain: the harm category.
      label: whether the answer is harmful.
      source: where the row comes from.
      split: what the row may be used for.
      informative: a safe answer that is not a refusal and long enough to inform.
      group: near-duplicate prompts share it; a group lies in one split.
    """

    id: int
    messages: tuple[dict[str, str], ...]
    response: str
    domain: str
    label: Label
    source: str
    split: Split
    informative: bool
    group: int

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]
