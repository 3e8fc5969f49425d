"""Downloads files of a hub repository: goes on where an earlier attempt stopped, and checks what has arrived."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llm_infer.base.errors import ModelError
from llm_infer.base.progress import Task

ATTEMPTS = 5
"""Connections in a row that bring no byte before a download is given up."""

AT_ONCE = 8
"""Files that are downloaded at the same time."""

_WAIT_SECONDS = 1.0
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        url: where it is.
        target: path to write, as in the hub's cache: its name is the SHA-256 of the content, or of files outside LFS git's
            SHA-1.
        lock: file that keeps other processes from downloading the same.
        filename: what messages call it.
        num_bytes: its size.
    """

    url: str
    target: Path
    lock: Path
    filename: str
    num_bytes: int


def download_all(downloads: Iterable[Download], task: Task) -> None:
    """Downloads files, a few at a time.

    Until one is complete and checked its bytes are in `target` + ".incomplete", where the next call goes on.

    Args:
        downloads: files whose targets do not exist.
        task: is told of the bytes that are here.

    Raises:
        ModelError: a file has another hash than its name says, and has been removed.
        OSError, or an error of the HTTP library: a file cannot be had.
    """
    waiting, failures, stop = deque(downloads), list[BaseException](), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                try:
                    file = waiting.popleft()
                except IndexError:  # others have the rest
                    return
                _download(file, task, stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    # As daemons they do not hold up a program that Ctrl-C ends while a server is silent.
    count = min(AT_ONCE, len(waiting))
    threads = [threading.Thread(target=work, name="hub-download", daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:  # those that are writing come to their end
            if thread.is_alive():
                thread.join(_WAIT_SECONDS / count)
    if failures:
        raise failures[0]


def _download(file: Download, task: Task, stop: threading.Event) -> None:
    from huggingface_hub.utils import WeakFileLock

    target = file.target
    target.parent.mkdir(parents=True, exist_ok=True)
    file.lock.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.incomplete")
    with WeakFileLock(file.lock):
        if target.exists():  # another process was faster
            task.advance(file.num_bytes)
            return
        with partial.open("ab") as stream:
            if stream.tell() > file.num_bytes:
                stream.truncate(0)
            task.advance(stream.tell())
            _complete(file.url, stream, file.num_bytes, task, stop)
        if not stop.is_set():
            _check(partial, target.name, file.filename)
            os.replace(partial, target)


def _complete(url: str, file: BinaryIO, num_bytes: int, task: Task, stop: threading.Event) -> None:
    """Appends what is missing, in as many connections as it takes while each brings something."""
    from huggingface_hub import errors

    transport_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    failures = 0
    while (start := file.seek(0, os.SEEK_END)) < num_bytes and not stop.is_set():
        reason: Exception = OSError(f"the connection ended after {start} of {num_bytes} bytes")
        try:
            _append(url, file, num_bytes, task, stop)
        except errors.HfHubHTTPError:  # an answer, and no broken connection
            raise
        except transport_error as error:
            reason = error
        if file.seek(0, os.SEEK_END) > start:
            failures = 0
            continue
        failures += 1
        if failures == ATTEMPTS:
            raise reason
        time.sleep(_WAIT_SECONDS)


def _append(url: str, file: BinaryIO, num_bytes: int, task: Task, stop: threading.Event) -> None:
    """Appends what one connection brings."""
    from huggingface_hub import constants, utils

    start = file.tell()
    # Bytes are counted, so they must come as they are.
    headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    session = utils.get_session()
    with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        utils.hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server cannot begin in the middle
            file.truncate(0)
            task.advance(-start)
        for block in response.iter_raw():
            file.write(block)
            task.advance(len(block))
            if file.tell() > num_bytes or stop.is_set():
                break
        file.flush()


def _check(path: Path, expected: str, filename: str) -> None:
    """Removes the file and raises ModelError unless its hash is the expected one."""
    if len(expected) == 64:
        kind, digest = "SHA-256", hashlib.sha256()
    else:  # git's: of a header and the content
        kind, digest = "git SHA-1", hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if (found := digest.hexdigest()) != expected:
        path.unlink()
        raise ModelError(
            f"{filename} has {kind} {found}, expected {expected}: what arrived is damaged and has been removed; run the same "
            "command again, and if that does not help look for a proxy between here and the hub"
        )
