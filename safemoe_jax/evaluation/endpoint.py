"""Judges behind any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp's server, or a service.

    evaluation.judges = ("wildguard@http://localhost:8000/v1#allenai/wildguard",)

The prompts and answers, harmful ones among them, go to that address. A key comes from
$SAFEMOE_JUDGE_API_KEY; it is in no config, log or file, and is sent over https or within this
machine only.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.util import Retry

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.asked import KEY_VARIABLE, Asked, AskedJudge, Row, Texts
from safemoe_jax.evaluation.judge_templates import Reply
from safemoe_jax.progress import console, track
from safemoe_jax.remote import is_loopback

_AT_ONCE = 8
_TIMEOUT = (10, 300)  # seconds: to connect; without a byte of the reply
# Waits 0, 2, 4, 8, 16, 32 s and up to a second more, or what the server's Retry-After says.
_RETRIES: dict[str, Any] = {"total": 6, "backoff_factor": 1, "backoff_jitter": 1}
_RETRIED = (408, 429, 500, 502, 503, 504)
_ROW_REFUSED = (400, 413, 422)  # this text is too long, say; others may do
_QUOTED = 80  # characters of a server's message; it may quote what it was sent


class EndpointJudge(AskedJudge):
    """Asks a model at an endpoint."""

    def __init__(self, asked: Asked, directory: Path) -> None:
        """Asks nothing yet.

        Args:
          asked: what is asked, and whom; its place is a URL.
          directory: of the file with all that was asked and replied, judge_NAME.jsonl.
        """
        super().__init__(asked, directory)
        self._session = _session(asked.place)
        self._is_said = False

    def check(self) -> None:
        """Says where answers will go, and whether anybody listens there.

        Raises:
          UserError: where nobody does, or the key is not taken.
        """
        self._say_where()
        status = self._send("GET", "models", None).status_code
        if status in (401, 403):
            raise UserError(f"judge {self.name}: {self._place} says {status}; {self._key_remedy}")

    def _ask(self, todo: Mapping[str, Texts], keep: Callable[[Row], None]) -> str:
        self._say_where()  # an evaluation that was there has checked nothing
        refused = ""
        # Its threads are daemons: Ctrl-C need not wait for a reply.
        with ThreadPool(min(_AT_ONCE, len(todo))) as pool:
            asked = pool.imap_unordered(self._ask_one, todo.items())
            for row in track(asked, total=len(todo), description=f"judge {self.name}"):
                if "refused" in row:
                    refused = row["refused"]
                else:
                    keep(row)
        return refused

    def _say_where(self) -> None:
        if self._is_said or is_here(self.asked.place):
            return
        self._is_said = True
        scheme = urlsplit(self.asked.place).scheme
        console.print(
            f"judge {self.name}: prompts and answers, harmful ones among them, go to "
            f"{self.asked.place}{', unencrypted' if scheme == 'http' else ''}"
        )

    def _ask_one(self, item: tuple[str, Texts]) -> Row:
        key, texts = item
        template = self.asked.template
        bodies, tries = template.requests(*texts), []
        path = "completions" if template.request == "text" else "chat/completions"
        for _ in range(template.tries):
            replies = []
            for body in bodies:
                response = self._send("POST", path, body)
                if response.status_code in _ROW_REFUSED:
                    return {"key": key, "refused": _said(response)}
                replies.append(self._reply(response))
            tries.append(replies)
            if template.parse(replies) is not None:
                break
        return self._row(key, texts, bodies, tries)

    def _reply(self, response: requests.Response) -> Reply:
        if response.status_code != 200:
            remedy = "correct its entry in evaluation.judges"
            if response.status_code in (401, 403):
                remedy = self._key_remedy
            elif response.status_code in _RETRIED:
                remedy = "once it is well, the same command goes on from there"
            raise UserError(f"judge {self.name}: {self._place} says {_said(response)}; {remedy}")
        try:
            choice = response.json()["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            if not isinstance(text, str | None):  # kept, it would be read again and again
                raise TypeError
            first = ((choice.get("logprobs") or {}).get("top_logprobs") or [None])[0]
            probabilities = {token: math.exp(p) for token, p in first.items()} if first else None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"judge {self.name}: {self._place} replies in another form than OpenAI's API "
                f"({type(error).__name__}); is the URL the one that ends with /v1?"
            ) from error
        return Reply(text or "", probabilities)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> requests.Response:
        try:
            return self._session.request(
                method,
                f"{self.asked.place}/{path}",
                json={"model": self.asked.model, **body} if body else None,
                timeout=_TIMEOUT,
                allow_redirects=False,  # answers go where the user says, and nowhere else
            )
        except requests.RequestException as error:
            raise UserError(
                f"judge {self.name}: no reply from {self._place} ({type(error).__name__}); start "
                "it, or take it out of evaluation.judges; the same command goes on from there"
            ) from error

    @property
    def _who(self) -> tuple[str, ...]:
        return (self.asked.model,)

    @property
    def _place(self) -> str:
        return f"{self.asked.place} ({self.asked.model})"

    @property
    def _key_remedy(self) -> str:
        if os.environ.get(KEY_VARIABLE) and not _may_have_key(self.asked.place):
            return f"${KEY_VARIABLE} is not sent over http to another machine; use https"
        return f"set ${KEY_VARIABLE} to a key that it takes"


def is_here(url: str) -> bool:
    """Whether an endpoint is on this machine."""
    return is_loopback(urlsplit(url).hostname or "")


def _said(response: requests.Response) -> str:
    """Status and the beginning of the server's message."""
    try:
        message = response.json()
        message = message.get("error", message)
        message = message.get("message", "") if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = ""
    return f"{response.status_code} {str(message)[:_QUOTED]}".rstrip()


def _may_have_key(url: str) -> bool:
    return is_here(url) or url.startswith("https:")


def _key() -> str:
    """The key, "" for none; what HTTP would refuse, and quote, is refused here."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"${KEY_VARIABLE} has {len(key)} characters, and not all are printable ASCII: a "
            "line end behind the key, perhaps; set it to the key alone"
        )
    return key


def _session(url: str) -> requests.Session:
    # It would say each retry of each thread; what the last one ended in is said by `_send`.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    session = requests.Session()
    retry = Retry(
        **_RETRIES,
        status_forcelist=_RETRIED,
        allowed_methods=None,  # a judgement may be asked for twice
        raise_on_status=False,
    )
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=_AT_ONCE, max_retries=retry)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    # What stays on this machine passes no proxy.
    session.trust_env = not is_here(url)
    key = _key() if _may_have_key(url) else ""
    session.auth = functools.partial(_authorize, key)  # else ~/.netrc would speak up
    return session


def _authorize(key: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request
