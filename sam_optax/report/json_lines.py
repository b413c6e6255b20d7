"""Scalars from the JSON-lines files that SeqIO's `JSONLogger` writes."""

import json
from collections.abc import Callable
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
            values.setdefault(metric, {})[step] = value
    if damaged:
        some = ", ".join(map(str, damaged[:_LINES_NAMED]))
        more = f" and {len(damaged) - _LINES_NAMED} more" if len(damaged) > _LINES_NAMED else ""
        warn(
            f"{file}: line{'s'[: len(damaged) > 1]} {some}{more} not readable as a step's metrics; "
            "the other lines were read."
        )
    return values, not damaged
