"""Reads the collectives out of a compiled program's text."""

from __future__ import annotations

import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_OP = re.compile(rf"= \(?(\S+?)(?:\{{[\d,]*\}})?(?:, [^=]*)? ({'|'.join(KINDS)})(?:-start)?\(")


def collectives(text: str) -> tuple[Counter[str], Counter[str], list[str]]:
    """Collectives by kind in the bodies of loops and outside of them, and the result shapes of all all-gathers."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside, outside, gathered, name = Counter(), Counter(), [], ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        found = _OP.search(line)
        if found:
            (inside if name in bodies else outside)[found[2]] += 1
            if found[2] == "all-gather":
                gathered.append(found[1])
    return inside, outside, gathered
