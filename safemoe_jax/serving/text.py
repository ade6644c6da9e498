"""Tokens become text while they come: whole characters only, up to a stop string."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of a character decode to until its last


class TextStream:
    """Cuts an answer's text into pieces that, joined, are what all tokens decode to at once.

    A piece is held back while it may still change: a character that lacks bytes, or what may
    become a stop string. The stop string itself, and all behind it, is left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """Begins an answer.

        Args:
          decode: token ids to text.
          stops: strings that end the answer; none of them empty.
        """
        self._decode, self._stops = decode, stops
        self._tokens: list[int] = []
        self._start = self._read = 0  # tokens[start:read] are the context of those behind them
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece that can be told now, perhaps empty; `stopped` says whether it was the last."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._until_stop(text)

    def end(self) -> str:
        """The last piece, once no token follows."""
        text = self._until_stop(self._new_text())
        text, self._held = text + self._held, ""
        return text

    def _new_text(self) -> str:
        """What the tokens from `read` on add. Some decoders treat the first token of a text in a
        way of its own, so they are decoded behind the tokens before them."""
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        ready = len(self._held) - _overlap(self._held, self._stops)
        text, self._held = self._held[:ready], self._held[ready:]
        return text


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Characters at the text's end with which a stop string may have begun."""
    return max(
        (
            size
            for stop in stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ),
        default=0,
    )
