"""The collectives of a compiled step, read from its HLO text."""

import re
from typing import NamedTuple

import numpy as np

_SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1}
_OP = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)


class Collective(NamedTuple):
    """One collective: its kind, and the bytes of its result on a device."""

    kind: str
    bytes: int


def collectives(compiled) -> list[Collective]:
    """Return every collective of the compiled program; a loop's once."""
    return [
        Collective(match["kind"], sum(map(_bytes, re.findall(r"\w+\[[\d,]*\]", match["shape"]))))
        for match in map(_OP.search, compiled.as_text().splitlines())
        if match
    ]


def bytes_of(compiled, kind: str) -> int:
    """Return the bytes of all collectives of one kind."""
    return sum(c.bytes for c in collectives(compiled) if c.kind == kind)


def _bytes(shape: str) -> int:
    dtype, dims = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    return _SIZES[dtype] * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
