"""Scalars from the JSON-lines files that SeqIO's `JSONLogger` writes."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

Values = dict[str, dict[int, float]]
"""By metric and step."""

_LINES_NAMED = 5  # in a warning


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
            step = int(record.pop("step"))
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
        some = ", ".join(map(str, damaged[:_LINES_NAMED]))
        more = f" and {len(damaged) - _LINES_NAMED} more" if len(damaged) > _LINES_NAMED else ""
        warn(
            f"{file}: line{'s'[: len(damaged) > 1]} {some}{more} not readable as a step's metrics; "
            "the other lines were read."
        )
    abandoned = sorted(set().union(*map(_before_a_smaller, values.values())))
    if abandoned:
        warn(
            f"{file}: step {', '.join(map(str, abandoned))} evaluated before a smaller one, as by "
            "a run that was restarted from an older checkpoint; it counts, though the run that "
            "went on has not come to it."
        )
    return values, not damaged


def _before_a_smaller(steps: Iterable[int]) -> set[int]:
    """Return the steps that a smaller one comes after."""
    found, smallest = set(), math.inf
    for step in reversed(list(steps)):
        if step > smallest:
            found.add(step)
        smallest = min(smallest, step)
    return found
