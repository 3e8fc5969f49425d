"""What stands before every route: who may ask, from where, with how many headers; each request gets its id."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Sequence

from llm_infer.server.errors import ApiError
from llm_infer.server.exchange import Receive, Scope, Send
from llm_infer.server.options import OPEN, ServerOptions

MAX_HEADERS = 256
MAX_HEADER_BYTES = 1 << 16

_PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Gate:
    """An ASGI application around another: refuses what must not come in.

    Every path needs a key but those of OPEN, whatever routes there are: the path is compared as it was sent.

    Args:
        app: gets what is let in.
        options: keys and hosts.
        refused: is told the method, the request's id and why, of each request that is not let in.
    """

    def __init__(self, app: object, options: ServerOptions, refused: Callable[[str, str, ApiError], None]) -> None:
        self._app, self._options, self._refused = app, options, refused
        # Digests have one length, so the comparison says nothing about a key.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in options.api_keys]
        self._hosts = _LOCAL_HOSTS | {host.lower() for host in options.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers why not."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # type: ignore[operator]
            return
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        given = dict(headers).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _PRINTABLE.fullmatch(given) else secrets.token_hex(12)
        scope["llm_infer"] = {"request_id": request_id, "salt": None}

        async def send_with_id(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._check_headers(headers)
            self._check_host(headers)
            scope["llm_infer"]["salt"] = self._checked_key(scope, headers)
        except ApiError as error:
            self._refused(scope["method"], request_id, error)
            body = json.dumps(error.body()).encode()
            shown = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            shown += [(name.encode(), value.encode()) for name, value in error.headers.items()]
            # The body is not read, so what follows on the connection could not be told from it.
            shown.append((b"connection", b"close"))
            await send_with_id({"type": "http.response.start", "status": error.status, "headers": shown})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
            return
        await self._app(scope, receive, send_with_id)  # type: ignore[operator]

    @staticmethod
    def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            limits = f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
            raise ApiError(431, f"too many or too long headers: expected {limits}", code="headers_too_large")

    def _check_host(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        if not self._options.on_loopback or "*" in self._hosts:
            return
        sent = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        host = re.sub(r":\d*$", "", sent[0]) if len(sent) == 1 else ""
        if host not in self._hosts:
            raise ApiError(403, "this name of a host is not allowed here: see --allowed-host", code="host_not_allowed")

    def _checked_key(self, scope: Scope, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """Returns what keeps this client's cached prefixes from those of others; None where there are no keys."""
        if not self._keys:
            return None
        raw = scope.get("raw_path") or scope["path"].encode()
        if raw.split(b"?")[0].decode("latin-1") in OPEN:
            return None
        sent = [value[7:] for name, value in headers if name == b"authorization" and value[:7].lower() == b"bearer "]
        sent += [value for name, value in headers if name == b"x-api-key"]
        digests = {hashlib.sha256(key).digest() for key in sent}
        if len(digests) != 1:
            digests = {b""}
        (digest,) = digests
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, however early one fits
        if not any(matches):
            raise ApiError(
                401,
                "a valid key is needed: send it as `Authorization: Bearer KEY` or as `X-Api-Key`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return digest.hex()[:16] if len(self._keys) > 1 else None
