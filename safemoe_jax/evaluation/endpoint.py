"""Judges behind any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp's server, or a service.

    evaluation.judges = ("wildguard@http://localhost:8000/v1#allenai/wildguard",)

The prompts and answers, harmful ones among them, go to that address. What is asked and replied is
kept line by line in a file of its owner's alone, by content: nothing is asked twice, also not after
a kill. A key comes from $SAFEMOE_JUDGE_API_KEY; it is in no config, log or file, and is sent over
https or within this machine only.
"""

import dataclasses
import functools
import ipaddress
import math
import os
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.util import Retry

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.judge_templates import Reply, Template, load_template
from safemoe_jax.evaluation.likelihood import Messages
from safemoe_jax.evaluation.verdicts import MISSING, Verdict, content_key
from safemoe_jax.private_files import append_json, read_json_lines
from safemoe_jax.progress import console, track

KEY_VARIABLE = "SAFEMOE_JUDGE_API_KEY"
_LOOPBACK_URL = "http://localhost:8000/v1"  # where vLLM listens
_AT_ONCE = 8
_TIMEOUT = (10, 300)  # seconds: to connect; without a byte of the reply
# Waits 0, 2, 4, 8, 16, 32 s and up to a second more, or what the server's Retry-After says.
_RETRIES: dict[str, Any] = {"total": 6, "backoff_factor": 1, "backoff_jitter": 1}
_RETRIED = (408, 429, 500, 502, 503, 504)
_ROW_REFUSED = (400, 413, 422)  # this text is too long, say; others may do
_QUOTED = 80  # characters of a server's message; it may quote what it was sent


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One of `evaluation.judges`: TEMPLATE[@URL]#MODEL."""

    template: Template
    url: str
    model: str

    @property
    def name(self) -> str:
        return self.template.name

    @property
    def is_loopback(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @property
    def path(self) -> str:
        return "completions" if self.template.request == "text" else "chat/completions"


def parse_endpoints(texts: Sequence[str]) -> list[Endpoint]:
    """Reads `evaluation.judges`.

    Raises:
      UserError: on a text of another form, an unknown template, a URL that holds a password, or a
        template that is named twice.
    """
    endpoints = [_parse(text) for text in texts]
    names = [endpoint.name for endpoint in endpoints]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"config.evaluation.judges names {twice[0]} twice; name each judge once")
    return endpoints


def _parse(text: str) -> Endpoint:
    where, _, model = text.partition("#")
    name, _, url = where.partition("@")
    url = (url or _LOOPBACK_URL).rstrip("/")
    try:
        parts = urlsplit(url)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if not model or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"config.evaluation.judges has {text!r}; write TEMPLATE#MODEL or TEMPLATE@URL#MODEL, "
            f"such as wildguard@{_LOOPBACK_URL}#allenai/wildguard"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"the URL of judge {name} holds more than an address; put a key into ${KEY_VARIABLE}"
        )
    return Endpoint(load_template(name), url, model)


class EndpointJudge:
    """Asks a model at an endpoint; its verdicts know what the template asks for and no more."""

    def __init__(self, endpoint: Endpoint, directory: Path) -> None:
        """Asks nothing yet.

        Args:
          endpoint: what is asked, and where.
          directory: of the file with all that was asked and replied, judge_NAME.jsonl.
        """
        self.name = endpoint.name
        self.endpoint = endpoint
        self.reliability: dict[str, dict[str, Any]] = {}
        self.unreadable = 0  # replies that could not be read, those that were asked again included
        self.path = directory / f"judge_{endpoint.name}.jsonl"
        self._session = _session(endpoint)

    def check(self) -> None:
        """Says where answers will go, and whether anybody listens there.

        Raises:
          UserError: where nobody does, or the key is not taken.
        """
        if not self.endpoint.is_loopback:
            scheme = urlsplit(self.endpoint.url).scheme
            console.print(
                f"judge {self.name}: prompts and answers, harmful ones among them, go to "
                f"{self.endpoint.url}{', unencrypted' if scheme == 'http' else ''}"
            )
        status = self._send("GET", "models", None).status_code
        if status in (401, 403):
            raise UserError(f"judge {self.name}: {self._place} says {status}; {self._key_remedy}")

    def judge(self, pairs: Sequence[tuple[Messages, str]]) -> list[Verdict]:
        """One verdict for each pair; what is on file is not asked again.

        Raises:
          UserError: where the endpoint fails for good; what was replied until then is kept.
        """
        texts = [(messages[-1]["content"], answer) for messages, answer in pairs]
        keys = [content_key(*text, *self._identity) for text in texts]
        known = {row["key"]: row for row in read_json_lines(self.path)}
        todo = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if todo:
            asked, refused = self._ask_all(todo)
            known |= asked
            if refused and not known:
                raise UserError(f"judge {self.name}: {self._place} refuses all texts: {refused}")
        self.unreadable = sum(
            self.endpoint.template.parse(replies) is None
            for key in dict.fromkeys(keys)
            for replies in _tries(known.get(key))
        )
        return [self._verdict(known.get(key)) for key in keys]

    def _ask_all(
        self, todo: Mapping[str, tuple[str, str]]
    ) -> tuple[dict[str, dict[str, Any]], str]:
        """Asks and keeps each reply as it comes -> rows of the file, and why texts have none."""
        rows, refused = {}, ""
        # Its threads are daemons: Ctrl-C need not wait for a reply.
        with ThreadPool(min(_AT_ONCE, len(todo))) as pool:
            asked = pool.imap_unordered(self._ask, todo.items())
            for row in track(asked, total=len(todo), description=f"judge {self.name}"):
                if "refused" in row:
                    refused = row["refused"]
                    continue
                append_json(self.path, row)
                rows[row["key"]] = row
        if refused:
            console.print(
                f"judge {self.name}: {len(todo) - len(rows)} of {len(todo)} texts were refused, "
                f"as: {refused}"
            )
        return rows, refused

    def _ask(self, item: tuple[str, tuple[str, str]]) -> dict[str, Any]:
        key, (prompt, answer) = item
        template = self.endpoint.template
        row: dict[str, Any] = {"key": key, "model": self.endpoint.model}
        row |= {"template": template.name, "template_sha256": template.sha256}
        bodies = template.requests(prompt, answer)
        row |= {"prompt": prompt, "answer": answer, "requests": bodies, "replies": []}
        for _ in range(template.tries):
            replies = []
            for body in bodies:
                response = self._send("POST", self.endpoint.path, body)
                if response.status_code in _ROW_REFUSED:
                    return {"key": key, "refused": _said(response)}
                replies.append(self._reply(response))
            row["replies"].append([dataclasses.asdict(reply) for reply in replies])
            if template.parse(replies) is not None:
                break
        return row

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
                f"{self.endpoint.url}/{path}",
                json={"model": self.endpoint.model, **body} if body else None,
                timeout=_TIMEOUT,
                allow_redirects=False,  # answers go where the user says, and nowhere else
            )
        except requests.RequestException as error:
            raise UserError(
                f"judge {self.name}: no reply from {self._place} ({type(error).__name__}); start "
                "it, or take it out of evaluation.judges; the same command goes on from there"
            ) from error

    def _verdict(self, row: Mapping[str, Any] | None) -> Verdict:
        for replies in reversed(_tries(row)):
            return self.endpoint.template.parse(replies) or MISSING
        return MISSING

    @functools.cached_property
    def _identity(self) -> tuple[str, str, str]:
        return self.name, self.endpoint.template.sha256, self.endpoint.model

    @property
    def _place(self) -> str:
        return f"{self.endpoint.url} ({self.endpoint.model})"

    @property
    def _key_remedy(self) -> str:
        if os.environ.get(KEY_VARIABLE) and not _may_have_key(self.endpoint):
            return f"${KEY_VARIABLE} is not sent over http to another machine; use https"
        return f"set ${KEY_VARIABLE} to a key that it takes"


def _tries(row: Mapping[str, Any] | None) -> list[list[Reply]]:
    return [[Reply(**reply) for reply in replies] for replies in row["replies"]] if row else []


def _said(response: requests.Response) -> str:
    """Status and the beginning of the server's message."""
    try:
        message = response.json()
        message = message.get("error", message)
        message = message.get("message", "") if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = ""
    return f"{response.status_code} {str(message)[:_QUOTED]}".rstrip()


def _may_have_key(endpoint: Endpoint) -> bool:
    return endpoint.is_loopback or endpoint.url.startswith("https:")


def _session(endpoint: Endpoint) -> requests.Session:
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
    session.trust_env = not endpoint.is_loopback
    key = os.environ.get(KEY_VARIABLE, "") if _may_have_key(endpoint) else ""
    session.auth = functools.partial(_authorize, key)  # else ~/.netrc would speak up
    return session


def _authorize(key: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request
