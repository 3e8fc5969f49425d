"""Errors as clients see them: a status and OpenAI's error body, never a path, an address or what somebody sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 1000
"""Most characters of a message."""

MAX_VALIDATION_ERRORS = 10
"""Most errors of one body that a message names."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client's user.
        param: the field that is wrong.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object, with all four keys."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns an error of status 400."""
    return ApiError(400, message, param=param, code=code)
