"""Conversations as tokens: the model's own chat template, and which tokens carry loss."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from rich.text import Text

from safemoe_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]

_PROBE: tuple[Messages, str] = (({"role": "user", "content": "One?"},), "Two.")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One conversation with its answer.

    Attributes:
      tokens: int32 [n], prompt (generation prompt included), answer, end-of-turn token.
      response_start: index of the answer's first token; from there on tokens carry loss.
    """

    tokens: np.ndarray
    response_start: int

    @property
    def response_tokens(self) -> int:
        return len(self.tokens) - self.response_start

    def cut_to(self, length: int) -> "Encoded":
        """Fits it into `length` tokens: the response loses its end, down to half of them, then the
        prompt its left."""
        if len(self.tokens) <= length:
            return self
        prompt = self.tokens[: self.response_start]
        response = self.tokens[self.response_start :]
        kept = max(length - len(prompt), min(len(response), length // 2))
        prompt = prompt[max(len(prompt) - (length - kept), 0) :]
        return Encoded(np.concatenate([prompt, response[:kept]]), len(prompt))


class Unencodable(UserError):
    """A conversation that the chat template does not take.

    Attributes:
      reason: why, without its text and without the template's own words.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChatFormat:
    """A tokenizer's chat template, with the answer told apart from the prompt.

    The answer's tokens are found by what the prompt alone encodes to, so that a template needs no
    generation markers. What a template adds by itself, such as a default system prompt, stays: the
    base was trained with it. White space round an answer is stripped, as many templates do.

    Attributes:
      end_of_turn: id of the token that closes an answer.
      ends: ids of the tokens at which decoding stops: this one, and the tokenizer's end of text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Checks the template on a short conversation.

        Args:
          tokenizer: a `transformers` tokenizer.

        Raises:
          UserError: where there is no template, or its mask is empty or covers everything.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an "
                "instruction-tuned base, or add chat_template to its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        # Any of them, until the probe, whose answer has none, shows which.
        self._closing = frozenset(tokenizer.added_tokens_decoder)
        self.end_of_turn = int(self.encode(*_PROBE).tokens[-1])
        self._closing &= {self.end_of_turn}
        eos = tokenizer.eos_token_id
        self.ends = frozenset({self.end_of_turn} | (set() if eos is None else {eos}))

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids from which an answer to `messages` is generated."""
        return self._tokenize([self._prompt_text(messages)])[0]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of text outside any conversation, with what the tokenizer puts before it."""
        return self.tokenizer(text)["input_ids"]

    def text(self, tokens: Sequence[int]) -> str:
        """What token ids say, as it is: no space is tidied away."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def encode(self, messages: Messages, response: str) -> Encoded:
        """Encodes one conversation; see `encode_all`."""
        return self.encode_all([(messages, response)])[0]

    def encode_all(self, conversations: Sequence[tuple[Messages, str]]) -> list[Encoded]:
        """Encodes conversations, in one call of the tokenizer.

        Args:
          conversations: (messages that end with a user turn, answer) pairs.

        Raises:
          Unencodable: where the template refuses the turns, hides the answer, or changes the prompt
            before it.
        """
        encoded = []
        for item in self.encode_each(conversations):
            if isinstance(item, Unencodable):
                raise item
            encoded.append(item)
        return encoded

    def encode_each(
        self, conversations: Sequence[tuple[Messages, str]]
    ) -> list[Encoded | Unencodable]:
        """Encodes what can be encoded; what cannot is the error that `encode_all` would raise."""
        found: dict[int, Encoded | Unencodable] = {}
        texts: dict[int, tuple[str, str]] = {}
        for place, (messages, response) in enumerate(conversations):
            try:
                texts[place] = self._prompt_text(messages), self._whole_text(messages, response)
            except Unencodable as error:
                found[place] = error
        prompts = self._tokenize([prompt for prompt, _ in texts.values()])
        wholes = self._tokenize([whole for _, whole in texts.values()])
        for place, prompt, whole in zip(texts, prompts, wholes, strict=True):
            try:
                found[place] = self._split(prompt, whole)
            except Unencodable as error:
                found[place] = error
        return [found[place] for place in range(len(conversations))]

    def _prompt_text(self, messages: Messages) -> str:
        return self._render(messages, add_generation_prompt=True)

    def _whole_text(self, messages: Messages, response: str) -> str:
        answer = {"role": "assistant", "content": response.strip()}
        return self._render([*messages, answer], add_generation_prompt=False)

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        # A ValueError: there are several templates, and none is the default.
        except (jinja2.TemplateError, ValueError) as error:
            roles = [message["role"] for message in messages]
            raise Unencodable(
                "the chat template refuses its turns",
                f"the chat template refuses turns {roles}: {error}; give the data the turns that "
                "the base's template knows",
            ) from error

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []  # transformers takes no empty batch
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _split(self, prompt: list[int], whole: list[int]) -> Encoded:
        if not prompt:
            raise Unencodable(
                "the chat template writes no prompt",
                "the chat template renders no prompt, so every token would carry loss; use a "
                "template that writes the user's turn and the generation prompt",
            )
        if whole[: len(prompt)] != prompt:
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
                len(whole),
            )
            raise Unencodable(
                "its prompt has other tokens once the answer follows",
                f"the chat template changes the prompt once an answer follows: of {len(prompt)} "
                f"prompt tokens the first {same} agree; use a template whose prompt with "
                "add_generation_prompt=True begins the whole conversation",
            )
        tokens = self._up_to_its_end(whole, len(prompt))
        if len(tokens) == len(prompt):
            raise Unencodable(
                "the chat template writes no answer",
                f"the chat template adds no answer after {len(prompt)} prompt tokens, so no token "
                "would carry loss; use a template that writes the assistant's turn",
            )
        return Encoded(np.array(tokens, np.int32), len(prompt))

    def _up_to_its_end(self, tokens: list[int], start: int) -> list[int]:
        """Drops what a template writes after the end-of-turn token, such as a newline or Phi-3's
        eos_token: the answer has ended there, and nobody generates it."""
        added, end = self.tokenizer.added_tokens_decoder, len(tokens)
        for i in reversed(range(start, len(tokens))):
            if tokens[i] in self._closing:
                end = i + 1
            elif tokens[i] not in added and self.tokenizer.decode([tokens[i]]).strip():
                break
        return tokens[:end]


def said(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What generated token ids say, without control tokens; no space is tidied away."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def colored(row: Mapping[str, np.ndarray], decode: Callable[[list[int]], str]) -> Text:
    """A packed row as text: prompts dim, tokens that carry loss green, segments headed by their id.

    Args:
      row: one row of a batch, without the batch axis.
      decode: token ids to text, the tokenizer's.
    """
    text = Text()
    for segment, example in enumerate(row["example_ids_BS"], start=1):
        (places,) = np.nonzero(row["segment_ids_BT"] == segment)
        if not len(places):
            break
        text.append(f"\n[expert {row['expert_ids_B']}, example {example}]\n", style="bold cyan")
        # The loss at t is that of predicting token t + 1, so the mask is shifted onto its token.
        carries_loss = np.concatenate([[False], row["loss_mask_BT"][places][:-1] > 0])
        for run, style in _runs(row["tokens_BT"][places], carries_loss):
            text.append(decode(run), style=style)
    return text


def _runs(tokens: np.ndarray, carries_loss: np.ndarray) -> Iterable[tuple[list[int], str]]:
    """Cuts tokens where the mask changes; whole runs decode right where one token may not."""
    cuts = np.flatnonzero(np.diff(carries_loss)) + 1
    for run, mask in zip(np.split(tokens, cuts), np.split(carries_loss, cuts), strict=True):
        yield run.tolist(), "green" if mask[0] else "dim"
