"""The OpenAI-compatible API: what requests may hold, and the JSON of answers and errors.

Nothing in a request can touch the gates: `gates: true` only asks to see them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MOST_CHOICES = 16
# What this server cannot do, and the value with which a client may still send it.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}
# What changes no answer.
_PASSED_OVER = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


class Refused(Exception):
    """A request that is not served, as the client will read it."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """In this API null is "not given"."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


def _unicode(values: list[Any]) -> list[Any]:
    """Refuses lone surrogates, which JSON can write and no tokenizer reads; numbers are passed."""
    for value in values:
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text is no valid Unicode") from error
    return values


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis; there is none


class _Body(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    gates: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key in _NEUTRAL and value is not None:
                if value != _NEUTRAL[key]:
                    raise ValueError(f"{key} is not supported here; leave it out")
            elif key not in _PASSED_OVER:
                kept[key] = value
        return kept

    @field_validator("gates", mode="before")
    @classmethod
    def _only_shown(cls, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError(
                "true shows the router's gates with the answer, false does not; no request can "
                "set them"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > 4 or not all(0 < len(stop) <= 256 for stop in stops):
            raise ValueError("give at most 4 strings of 1 to 256 characters")
        return _unicode(stops)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str = ""

    @field_validator("content")
    @classmethod
    def _is_unicode(cls, value: str | list[TextPart]) -> str | list[TextPart]:
        _unicode([value] if isinstance(value, str) else [part.text for part in value])
        return value

    def turn(self) -> dict[str, str]:
        """As a chat template reads it."""
        parts = [part.text for part in self.content] if isinstance(self.content, list) else None
        text = self.content if parts is None else "".join(parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": str(text)}


class ChatBody(_Body):
    """Of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _ends_with_the_user(cls, value: list[Message]) -> list[Message]:
        if value[-1].role != "user":
            raise ValueError("the last one must be the user's")
        return value


class CompletionBody(_Body):
    """Of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)

    @field_validator("prompt")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        _unicode(value if isinstance(value, list) else [value])
        return value

    def prompts(self) -> list[str | list[int]]:
        """One text, or one list of token ids, for each answer (times n)."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return [one for one in self.prompt if not isinstance(one, int)]


class Answers:
    """The JSON of one request's answers, whole or in chunks."""

    def __init__(self, model: str, id: str, *, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]
    ) -> dict[str, Any]:
        """Args: choices as `choice` gives them, in order, and the count of tokens."""
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """A server-sent event."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event({**self._head, "object": kind, "choices": list(choices), **more})

    def choice(
        self, index: int, text: str, finish: str | None, gates: Any, *, delta: bool = False
    ) -> dict[str, Any]:
        """One answer, or with `delta` a piece of one; `gates` None are left out."""
        said: dict[str, Any] = {"text": text}
        if self._chat and delta:
            said = {"delta": {"role": "assistant", "content": text}}
        elif self._chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        shown = {} if gates is None else {"gates": gates}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish, **shown}


def event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def error_body(refused: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {
        "message": refused.message,
        "type": kind,
        "param": refused.param,
        "code": refused.code,
    }
    return {"error": error}


def error_response(refused: Refused) -> JSONResponse:
    retry = {429: "1", 503: "5"}.get(refused.status)
    headers = {} if retry is None else {"Retry-After": retry}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refused), refused.status, headers)


def invalid(error: RequestValidationError) -> Refused:
    """The first of what is wrong with a body; names of its fields are quoted as ASCII, and cut."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ascii(".".join(place))[1:-1][:80]
    if first["type"].startswith("json"):
        return Refused(400, "the body is no valid JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"unknown field {field}; leave it out"
    else:
        said = first["msg"].removeprefix("Value error, ")
        message = f"{field}: {said}" if field else said
    return Refused(400, message, code="invalid_value", param=field or None)
