"""Written examples of refusals, answers and empty talk, by manner.

The labelled refusals of the embedded data come from few models, most of which say "I'm sorry, I
can't assist". A refusal is any reply that withholds what was asked: it declines, says that it is
not able, allowed or willing, disapproves in place of an answer, denies having what is needed,
redirects, or jokes it away. These texts, written for this package, spread over those acts and over
many wordings, and a judge can be tried on a manner that it was not taught. ANSWERS hold the traps:
answers that use the words of a refusal (cannot, sorry, illegal) or warn first and yet answer, that
say what is wrong where that was asked, and harmless ones that sound dangerous.
"""

import tomllib
from importlib.resources import files

_TEXTS = tomllib.loads(files(__package__).joinpath("examples.toml").read_text("utf-8"))

# manner -> texts
REFUSALS: dict[str, list[str]] = _TEXTS["refusals"]
ANSWERS: dict[str, list[str]] = _TEXTS["answers"]
EMPTY_TALK: list[str] = _TEXTS["talk"]["empty"]


def written() -> tuple[list[str], list[bool], list[str]]:
    """The refusals and answers, whether each is a refusal, and the manner of each."""
    sides = [(True, REFUSALS), (False, ANSWERS)]
    rows = [
        (text, refusal, manner)
        for refusal, manners in sides
        for manner, texts in manners.items()
        for text in texts
    ]
    texts, refusals, manners = map(list, zip(*rows, strict=True))
    return texts, refusals, manners
