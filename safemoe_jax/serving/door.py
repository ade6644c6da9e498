"""Who may come in, and with how large a body: what is decided before a request is read."""

import asyncio
import hmac
from typing import Any

from fastapi import HTTPException

from safemoe_jax.serving.protocol import Refused, error_response

_SECONDS_TO_SEND_BODY = 30


class Door:
    """ASGI, before another application.

    A web page can send a browser to a loopback address, even under a name of its own, and may then
    read the answer. So where there is no key, requests must be addressed to the address itself.
    """

    def __init__(self, app: Any, key: str | None, only_host: str | None, body_limit: int) -> None:
        self._app, self._key, self._limit = app, key, body_limit
        self._hosts = only_host and {only_host, f"[{only_host}]", "localhost", "127.0.0.1", "[::1]"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refused(headers, scope["path"])
        if refused:
            await error_response(refused)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refused(self, headers: dict[bytes, bytes], path: str) -> Refused | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            return Refused(403, "this server is reached by its loopback address", code="bad_host")
        sent = headers.get(b"authorization", b"")
        wanted = f"Bearer {self._key}".encode()
        if self._key and path != "/health" and not hmac.compare_digest(sent, wanted):
            return Refused(401, "a valid API key is needed", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._limit:
            return self._too_large()
        return None

    def _limited(self, receive: Any) -> Any:
        seen, complete = 0, False
        deadline = asyncio.get_running_loop().time() + _SECONDS_TO_SEND_BODY

        async def limited() -> Any:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "the body did not come in time") from error
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self._limit:
                # FastAPI lets this one through where it reads the body.
                raise HTTPException(413, self._too_large().message)
            return message

        return limited

    def _too_large(self) -> Refused:
        return Refused(413, f"a body may have {self._limit} bytes", code="too_large")
