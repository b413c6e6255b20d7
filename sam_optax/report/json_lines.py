"""Scalars from the JSON-lines files that SeqIO's `JSONLogger` writes."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Values = dict[str, dict[int, float]]
"""By metric and step."""

_NAMED = 5  # in a warning
_LARGEST_STEP = 2**53  # which a plot can show


def read_json_lines(file: Path, warn: Callable[[str], None]) -> tuple[Values, bool]:
    """Return the numbers in a file, by metric and step, and whether the whole of it was read.

    A step that is recorded twice was evaluated again by a resumed run: the later counts. Text and
    lists, which a logger may also write, are left out.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        warn(f"{file}: not readable ({error.strerror}).")
        return {}, False
    if not content.strip():
        warn(f"{file}: empty.")
        return {}, False
    values: Values = {}
    damaged = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = _step(record.pop("step"))
            numbers = {
                metric: float(value)
                for metric, value in record.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
            damaged.append(number)
            continue
        for metric, value in numbers.items():
            steps = values.setdefault(metric, {})
            steps.pop(step, None)  # so that the steps are in the order of what counts
            steps[step] = value
    if damaged:
        warn(
            f"{file}: {some('line', damaged)} not readable as a step's metrics; the rest was read."
        )
    abandoned = sorted(set().union(*map(_before_a_smaller, values.values())))
    if abandoned:
        warn(
            f"{file}: {some('step', abandoned)} evaluated before smaller ones, as by a run that "
            "went on from an older checkpoint, or by evaluations in another order. They count."
        )
    return values, not damaged


def _step(value: Any) -> int:
    if isinstance(value, bool | str) or value != int(value) or abs(value) > _LARGEST_STEP:
        raise ValueError(value)
    return int(value)


def some(what: str, numbers: list[int]) -> str:
    """Return such as "steps 1, 2, 3, 4, 5 and 12 more"."""
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{what}{'s'[: len(numbers) > 1]} {', '.join(map(str, numbers[:_NAMED]))}{more}"


def _before_a_smaller(steps: Iterable[int]) -> set[int]:
    """Return the steps that a smaller one comes after."""
    found, smallest = set(), math.inf
    for step in reversed(list(steps)):
        if step > smallest:
            found.add(step)
        smallest = min(smallest, step)
    return found
