"""Seeded damage to files: to their bytes, to the values of a JSON file and to the header of a binary file."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

_DEEP, _NAN, _TWICE = "@deep@", "@nan@", "@twice@"
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, 2**70, "", "x", [], {}, [[[]]], {"x": {"y": []}}),
    *("../secret", "/etc/passwd", "é" * 100_000, _DEEP, _NAN),
)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """The JSON text with one fault: in a value, a key, or the text itself."""
    kind = rng.choice(("replace",) * 6 + ("delete", "swap", "twice", "truncate", "not UTF-8"))
    if kind == "truncate":
        return data[: rng.randrange(len(data))]
    if kind == "not UTF-8":
        at = rng.randrange(len(data))
        return data[:at] + b"\xff\xfe" + data[at:]
    root = json.loads(data)
    places = list(_places(root))
    if not places:
        return data[:-1]
    container, key = rng.choice(places)
    if kind == "replace":
        container[key] = rng.choice(_VALUES)
    elif kind == "delete":
        del container[key]
    elif kind == "swap":
        other, second = rng.choice(places)
        one, two = json.dumps(container[key]), json.dumps(other[second])  # copies: no value holds itself
        container[key] = json.loads(two)
        if other is container or any(other is each for each, _ in _places(root)):
            other[second] = json.loads(one)
    elif isinstance(container, dict):
        container[_TWICE] = rng.choice(_VALUES[:10])
        return _text(root).replace(f'"{_TWICE}"'.encode(), json.dumps(key).encode())
    else:
        container.append(container[key])
    return _text(root)


def mutate_bytes(data: bytes, rng: random.Random, header: int) -> bytes:
    """The binary file with one fault, mostly in its first `header` bytes."""
    kind = rng.choice(("flip", "flips", "truncate", "u64", "u64", "u32", "u32", "copy", "insert"))
    if kind == "truncate":
        return data[: rng.randrange(rng.choice((header, len(data))))]
    at = rng.randrange(min(header, len(data) - 8))
    changed = bytearray(data)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 16):
            changed[rng.randrange(min(header, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "u64":
        number = rng.choice((0, 1, 32, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
        struct.pack_into("<Q", changed, at, number)
    elif kind == "u32":
        struct.pack_into("<I", changed, at, rng.choice((*range(45), 0x7FFFFFFF, 0xFFFFFFFF)))
    elif kind == "copy":
        source = rng.randrange(min(header, len(data) - 8))
        changed[at : at + 8] = data[source : source + 8]
    else:
        changed[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(changed)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The safetensors file with a fault in its bytes, or in the JSON of its header, whose length then fits."""
    length = struct.unpack_from("<Q", data)[0]
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, 8 + length)
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all values below this one."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found


def _text(root: Any) -> bytes:
    text = json.dumps(root, ensure_ascii=False).encode()
    return text.replace(f'"{_DEEP}"'.encode(), b"[" * 100_000 + b"]" * 100_000).replace(f'"{_NAN}"'.encode(), b"NaN")
