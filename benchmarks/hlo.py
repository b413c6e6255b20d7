"""The collectives of a compiled program, read from its HLO text: what, over which axes, how much.

Devices are numbered as in the mesh (row-major), which is how XLA numbers them in replica groups.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4}  # other dtypes have their width in their name
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(
    rf" = (?P<result>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(.*"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.* condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BELOW = re.compile(r"ROOT .* compare\(%[\w.\-]+, %(?P<limit>[\w.\-]+)\), direction=LT")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SEND = re.compile(r" = \(([a-z]+\d*\w*)\[([\d,]*)\]\S*, .*\) send\(.*is_host_transfer=true")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """A collective's arrays of one dtype.

    Attributes:
      kind: one of `KINDS`. A fusion that XLA:TPU names `all-reduce-scatter` is a reduce-scatter.
      axes: the mesh axes that it runs over, in the mesh's order.
      dtype: XLA's name, such as `bf16`.
      bytes: of the result on one device (of a fused reduce-scatter: of what is reduced), one run.
      times: how often it runs in a step; a loop whose trip count is not in the text counts once.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    times: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Return every collective in `text`, the HLO of a program on a mesh of these axis sizes."""
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    found, chains = [], set()
    for name, lines in computations.items():
        for line in lines:
            in_line = list(_in_line(line, name, runs[name], mesh))
            # XLA:TPU spreads a collective over the fusions that it runs beside: a chain of copies.
            chain = _CHAIN.search(line) if in_line else None
            if chain and chain[1] in chains:
                continue
            if chain:
                chains.add(chain[1])
            found += in_line
    return found


def sent_between_slices(text: str) -> int:
    """Return how many bytes a device sends to other slices of a pod, by way of its host."""
    return sum(_bytes(*sent.groups()) for sent in _SEND.finditer(text))


def replica_groups(text: str) -> list[list[int]]:
    """Return the groups of devices that `text`, from `replica_groups=` on, stands for.

    There are three notations: lists; `[groups,size]<=[dims]T(permutation)`, the numbers from 0 on,
    reshaped to `dims`, transposed and cut into groups; and names of axes of a mesh, which may be
    parts of axes, `'a':(before)size`, and whose devices may be in another order.
    """
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, dims = re.match(r"\[([\d,]+)\]<=(\S+)", text).groups()
        return _iota(dims).reshape(_ints(shape)).tolist()
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", _braces(text))]


def axes_of(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group, of any group, differ."""
    sizes = tuple(mesh.values())
    if not groups:  # "{}" is all devices
        return tuple(axis for axis, size in mesh.items() if size > 1)
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(group, sizes))
        differs |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, d in zip(mesh, differs, strict=True) if d)


def loops_without_trip_count(text: str) -> int:
    """Return how many loops run an unknown number of times, and so are counted once."""
    computations, _ = _computations(text)
    lines = (line for lines in computations.values() for line in lines)
    return sum(_WHILE.search(x) is not None and not _trips(x, computations) for x in lines)


def _in_line(line: str, computation: str, times: int, mesh) -> Iterator[Collective]:
    match = _COLLECTIVE.search(line)
    if not match:
        return
    kind = match["kind"]
    if kind == "collective-permute":
        pairs = _braces(line.split("source_target_pairs=", 1)[1])
        groups = [_ints(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs)]
    else:
        groups = replica_groups(line.split("replica_groups=", 1)[1])
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    sizes = collections.Counter()
    for dtype, dims in _result(match):
        sizes[dtype] += _bytes(dtype, dims)
    axes = axes_of(groups, mesh)
    for dtype, size in sizes.items():
        yield Collective(kind, axes, dtype, size, times)


def _result(match: re.Match) -> list[tuple[str, str]]:
    """Return dtype and dimensions of what the collective leaves on a device."""
    shapes = _SHAPE.findall(match["result"])
    if not match["start"] or match["kind"] == "all-reduce":
        return shapes
    if match["kind"] == "collective-permute":
        shapes = [shape for shape in shapes if shape != ("u32", "")]  # its two flags
    return shapes[len(shapes) // 2 :]  # operands come first


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(_ints(dims)) * bits // 8


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        match = None if line.startswith(" ") else _COMPUTATION.match(line)
        if match:
            lines = computations[match["name"]] = []
            entry = match["name"] if match["entry"] else entry
        else:
            lines.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> collections.Counter:
    """Return how often each computation runs when the entry runs once."""
    runs = collections.Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for line in computations[name]:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"%([\w.\-]+)", branches)
            for callee in called:
                loop = f"body=%{callee}," in line + ","
                run(callee, times * ((loop and _trips(line, computations)) or 1))

    run(entry, 1)
    return runs


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """Return how often a loop runs: as the compiler notes, or `n` where it goes on while `i < n`.

    The second is for loops from 0 on in steps of 1, as `jax.lax.scan` makes them: XLA:TPU drops the
    note.
    """
    noted = _TRIP_COUNT.search(line)
    if noted:
        return int(noted[1])
    condition = computations[_WHILE.search(line)["condition"]]
    below = next(filter(None, map(_BELOW.search, condition)), None)
    if not below:
        return None
    constant = re.compile(rf"%{re.escape(below['limit'])} = s32\[\]\S* constant\((\d+)\)")
    limit = next(filter(None, map(constant.search, condition)), None)
    return int(limit[1]) if limit else None


def _mesh_groups(text: str) -> list[list[int]]:
    head, devices, grouped = re.match(
        r"mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}", text
    ).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head)}
    # Cut each axis into (before, size, after), so that part of an axis is an axis.
    names, shape = [], []
    wanted = {
        name: (_ints(f"{before},{size}") if size else [1, sizes[name]])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
    }
    for name, full in sizes.items():
        before, size = wanted.get(name, (1, 1))
        names += [None, name if name in wanted else None, None]
        shape += [before, size, full // (before * size)]
    ids = _iota(devices) if devices else np.arange(math.prod(shape))
    inside = [names.index(name) for name in wanted]
    outside = [i for i in range(len(shape)) if i not in inside]
    size = math.prod(shape[i] for i in inside)
    return ids.reshape(shape).transpose(outside + inside).reshape(-1, size).tolist()


def _iota(text: str) -> np.ndarray:
    """Return `[dims]T(permutation)` or `1,0,3,2` as a flat array of device numbers."""
    match = _IOTA.match(text)
    if not match:
        return np.array(_ints(text))
    dims, permutation = match.groups()
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(permutation)) if permutation else ids).reshape(-1)


def _braces(text: str) -> str:
    """Return `text` up to the brace that closes its first."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[: i + 1]
    return text


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]
