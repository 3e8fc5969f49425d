"""One HTTP/1.1 response, read from bytes that may be cut anywhere."""

from __future__ import annotations

from collections.abc import Callable

MAX_HEAD = 64 << 10
"""Most bytes of a status line with headers."""


class MalformedResponse(Exception):
    """Bytes that are no HTTP/1.1 response."""


class Response:
    """The response to one request. `feed` takes what arrives.

    Attributes:
        status: HTTP status; 0 before the head is there.
        headers: by names in lower case.
        complete: whether the body has ended.
        reusable: whether the connection can carry another request.
    """

    def __init__(self, on_head: Callable[[Response], Callable[[bytes], None]]) -> None:
        """Makes the reader.

        Args:
            on_head: gets the response when its headers are there, and returns what takes the bytes of the body.
        """
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self.reusable = True
        self._on_head = on_head
        self._take: Callable[[bytes], None] = lambda data: None
        self._rest = b""
        self._read = self._read_head
        self._left = 0

    def feed(self, data: bytes) -> None:
        """Takes bytes from the network.

        Raises:
            MalformedResponse: they are no HTTP/1.1.
        """
        if self._rest:
            data = self._rest + data
        self._rest = b""
        self._read(data)

    def close(self) -> None:
        """Takes the end of the connection: a body without a length ends there; any other is left incomplete."""
        self.reusable = False
        if self._read == self._read_all:
            self.complete = True

    def _read_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD or not (data.startswith(b"HTTP/1.") or b"HTTP/1.".startswith(data[:7])):
                raise MalformedResponse(f"expected an HTTP/1.1 response, got {data[:40]!r}")
            self._rest = data
            return
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not status[:3].isdecimal():
            raise MalformedResponse(f"expected an HTTP/1.1 response, got {first[:40]!r}")
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if status[0] == "1":  # an interim response: the real one follows
            self._read_head(data[end + 4 :])
            return
        self.status = int(status[:3])
        connection = self.headers.get("connection", "").lower()
        self.reusable = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        self._take = self._on_head(self)
        if self.status in (204, 304):
            self.complete = True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._left, self._read = -1, self._read_chunks
        elif (length := self.headers.get("content-length")) is not None:
            if not length.isdecimal():
                raise MalformedResponse(f"content-length is {length[:40]!r}")
            self._left, self._read = int(length), self._read_counted
        else:
            self._read = self._read_all
        if not self.complete:
            self._read(data[end + 4 :])

    def _read_all(self, data: bytes) -> None:
        if data:
            self._take(data)

    def _read_counted(self, data: bytes) -> None:
        part = data[: self._left]
        self._left -= len(part)
        if part:
            self._take(part)
        self.complete = self._left == 0

    def _read_chunks(self, data: bytes) -> None:
        """Reads chunks; `_left` counts the bytes that a chunk still has, 0 before its line end and -1 before a size."""
        at, end = 0, len(data)
        while at < end:
            if self._left > 0:
                part = data[at : at + self._left]
                self._take(part)
                self._left -= len(part)
                at += len(part)
            elif self._left == 0:
                if data[at : at + 2] != b"\r\n"[: end - at]:
                    raise MalformedResponse("a chunk is longer than its size")
                if end - at < 2:
                    break
                self._left, at = -1, at + 2
            else:
                line = data.find(b"\r\n", at)
                if line < 0 and end - at <= 256:
                    break
                try:
                    size = int(data[at : max(line, at)].partition(b";")[0], 16)
                except ValueError:
                    raise MalformedResponse(f"expected the size of a chunk, got {data[at : at + 40]!r}") from None
                if size == 0:
                    self._read = self._read_trailers
                    self._read(data[line:])
                    return
                self._left, at = size, line + 2
        self._rest = data[at:]

    def _read_trailers(self, data: bytes) -> None:
        """Waits for the empty line after the last chunk; `data` starts with the line end before it."""
        if b"\r\n\r\n" in data:
            self.complete = True
        else:
            self._rest = data
