"""What the server writes about itself to standard error: one line for each request and for each fault, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time

LOGGER = "llm_infer.server"
FORMATS = ("text", "json")


def set_up(form: str, *, requests: bool) -> None:
    """Has this package's and uvicorn's records written to standard error.

    Args:
        form: one of FORMATS.
        requests: write a line for each request, too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name in (LOGGER, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING)
    logging.getLogger(LOGGER).setLevel(logging.INFO if requests else logging.WARNING)


def request_ended(
    log: logging.Logger,
    *,
    id: str,
    method: str,
    route: str,
    status: int,
    seconds: float,
    code: str | None = None,
    tokens: tuple[int, int] | None = None,
) -> None:
    """Writes that a request has ended.

    Args:
        log: where to.
        id, method, route, seconds: the request's.
        status: of HTTP; 499 stands for a client that left. A stream that failed later has 200 and a code.
        code: of its error.
        tokens: of its prompts, and new ones.
    """
    if log.isEnabledFor(logging.INFO):
        facts: dict[str, object] = {
            "id": id,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        text = f"{ascii(method)[1:-1]} {route} {status} {seconds:.3f} s"
        if code is not None:
            facts["code"] = code
            text += f" {code}"
        if tokens is not None:
            facts |= {"prompt_tokens": tokens[0], "new_tokens": tokens[1]}
            text += f" {tokens[0]} + {tokens[1]} tokens"
        log.info(f"{text} {ascii(id)[1:-1]}", extra={"facts": facts})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Returns the time, the level where it is a fault, and the message; a traceback has lines of its own."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{_one_line(record.getMessage())}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Returns one JSON object on one line."""
        found = {"time": round(record.created, 6), "level": record.levelname.lower(), "message": record.getMessage()}
        found |= getattr(record, "facts", {})
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def _one_line(text: str) -> str:
    """Returns the text with everything escaped that could forge another line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
