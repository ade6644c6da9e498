"""What a text itself shows: acts of refusal, repetition, and the words it shares with its prompt."""

import re
import unicodedata
import zlib

import numpy as np

_SELF = r"(i|we|i'm|i am|this assistant|as an ai[^.,]*,? ?(i)?)"
_NOT = (
    r"(cannot|can't|cant|can not|could not|couldn't|won't|will not|wouldn't|would not|am not|'m not"
    r"|are not|do not|don't|did not|didn't|unable|refuse|decline|must not|shouldn't|should not"
    r"|not able|not going|not willing|not comfortable|not allowed|not authori[sz]ed|not permitted)"
)
_GIVE = (
    r"(assist|help|provid|fulfil|comply|writ|giv|answer|engag|shar|support|creat|generat|offer|discuss"
    r"|produc|disclos|reveal|draft|design|assum|respond|promot|encourag|condon|satisf|participat|do th"
    r"|make|explain|describ|recommend|suggest|instruct|advi[sc]|access|speculat|verif|plan|show)"
)
_WRONG = (
    r"(illegal|unlawful|unethical|immoral|against the law|a crime|criminal|inappropriate"
    r"|not (ever )?(be )?(appropriate|acceptable|ethical|okay|ok|right|cool|a good idea)"
    r"|never (ever )?(be )?(appropriate|acceptable|okay|ok|right|justified|the answer|a good idea)"
    r"|irresponsible|violat\w+|unacceptable|morally wrong|wrong|disrespectful|hurtful|harmful"
    r"|dangerous|offensive)"
)

# Each act of refusal that linguistics would name, and the acts of answering that speak against it.
CUES = {
    "declines": rf"\b{_SELF}\b[^.!?\n]{{0,40}}?\b{_NOT}\b[^.!?\n]{{0,50}}?\b{_GIVE}\w*",
    "unable": rf"\b{_NOT}( be)?( able)?( to)?\b[^.!?\n]{{0,12}}?\b(help|assist|provide|fulfil|comply)",
    "apologises": r"\b(sorry|apolog\w+|regret\w*|unfortunately|i'm afraid|i am afraid)\b",
    "sympathises": r"\bsorry (to hear|about|for your|that you|you('re| are)|for the)\b",
    "names_the_request": r"\b(that|this|your|such( an?)?|the) (request|question|topic|task|subject)\b",
    "names_its_rules": r"\b(guidelines|polic(y|ies)|programm(ed|ing)|designed to|permitted|allowed to"
    r"|my (purpose|principles|values))\b",
    "names_itself": r"\b(an ai|ai (language )?model|language model|ai assistant|responsible ai)\b",
    "disapproves": rf"\b(is|be|are|would be|it's|was|considered|as|and|both)\b[^.!?\n]{{0,15}}?\b{_WRONG}",
    "warns_off": r"\b(should (not|never)|shouldn't|never|do not|don't|strongly advise|urge you|refrain"
    r"|avoid)\b",
    "preaches": r"\b(it('s| is) (important|crucial|essential|vital|best|better|more constructive)( to)?"
    r"|respect(ful|ing)?|dignity|kindness|empathy|treat (others|everyone)|let('s| us)|promote)\b",
    "redirects": r"\b(instead|rather than|please (consider|contact|seek|reach|talk|consult|do not|be)"
    r"|seek|reach out|professional|helpline|hotline|authorities|if you('re| are) (struggling|feeling)"
    r"|encourage you|happy to help|glad to|i can (help|offer)|alternatives?)\b",
    "lacks": r"\b(i|we)\b[^.!?\n]{0,20}\b(do not|don't|have no|no) (have )?(access|information|knowledge"
    r"|personal|real-?time|opinions?|any)\b",
    "keeps_private": r"\b(confidential|privacy|private|personal (information|data)|consent)\b",
    "complies": r"^\W*(sure|certainly|of course|absolutely|yes|okay|ok|here('s| is| are)|great)\b",
    "enumerates": r"(^|\s)(1[.)]|step (1|one)|first(ly)?,)",
    "hedges": r"\b(some|many|most|may|might|often|usually|because|for example|such as|however)\b",
}
_CUES = {name: re.compile(pattern) for name, pattern in CUES.items()}
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def fold(text: str) -> str:
    """NFKC, lower case, straight apostrophes, white space folded."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").replace("\u2018", "'")
    return " ".join(text.split())


def words(text: str) -> list[str]:
    return _WORD.findall(fold(text))


def opening(text: str, count: int = 60) -> str:
    """The first `count` words: a refusal declares itself there, whatever alternatives follow."""
    return " ".join(fold(text).split()[:count])


def refusal_cues(response: str) -> np.ndarray:
    """Counts of each cue in the first sentence and in the opening, and the opening's length.

    Args:
      response: the answer.

    Returns:
      float32 [2 * len(CUES) + 1].
    """
    start = opening(response)
    first = re.split(r"(?<=[.!?])\s", start, maxsplit=1)[0]
    counts = [
        min(len(cue.findall(part)), 3) / 3 for part in (first, start) for cue in _CUES.values()
    ]
    size = np.log1p(len(start.split()))
    return np.asarray([*counts, size / 8], np.float32)


def repetition(response: str) -> float:
    """Share of word 4-grams that occurred before in the text; 0 for a text under 8 words."""
    tokens = words(response)
    if len(tokens) < 8:
        return 0.0
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams)


def compressed_share(response: str) -> float:
    """Size after zlib over size before; prose of some hundred characters lies above 0.4."""
    data = response.encode()
    return len(zlib.compress(data, 9)) / max(len(data), 1)
