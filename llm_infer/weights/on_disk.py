"""Brings files to disk so that a directory appears with all of its bytes or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Makes a folder with these files; names are relative paths."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def sync_tree(folder: Path) -> None:
    """Brings everything below a folder to disk: no name may be there before its bytes are."""
    for directory, _, files in os.walk(folder):
        for path in (*(os.path.join(directory, name) for name in files), directory):
            sync(path)


def sync(path: str | Path) -> None:
    """Waits until a file, or the list of names of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
