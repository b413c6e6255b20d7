"""Scalars from TensorBoard's event files, with the `tensorboard` package alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .json_lines import Values


def read_events(folder: Path, warn: Callable[[str], None]) -> Values:
    """Return the scalars in a folder's event files, by tag and step.

    Of what is recorded twice, the later counts. A damaged file is read up to the damage.
    """
    files = sorted(folder.glob("*tfevents*"))
    try:
        # Not `tensorboard.compat.tf`, which would import TensorFlow.
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto import event_pb2
        from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow
    except Exception as error:  # of packages that do not fit one another, anything
        warn(f"{folder}: not read ({error}); pip install tensorboard")
        return {}
    values: Values = {}
    for file in files:
        steps = set()
        try:
            reader = pywrap_tensorflow.PyRecordReader_New(str(file))
            while True:
                reader.GetNext()
                event = event_pb2.Event.FromString(reader.record() or b"")  # pyright: ignore[reportAttributeAccessIssue]
                for value in event.summary.value:
                    number = _scalar(value)
                    if number is not None:
                        values.setdefault(value.tag, {})[event.step] = number
                        steps.add(event.step)
        except errors.OutOfRangeError:
            if not file.stat().st_size:
                warn(f"{file}: empty.")
        except UnicodeError:
            warn(f"{file}: not read: TensorBoard's reader wants a path that is UTF-8.")
        except (errors.OpError, DecodeError, OSError) as error:
            what = re.sub(re.escape(str(file)) + r"\s*", "", getattr(error, "message", str(error)))
            warn(f"{file}: damaged ({what}); {len(steps)} steps before that were read.")
    return values


def _scalar(value: Any) -> float | None:
    """Return the number in a summary value, or `None` if it is something else."""
    if value.HasField("simple_value"):
        return value.simple_value
    if not value.HasField("tensor"):
        return None
    from tensorboard.util import tensor_util

    try:
        array = tensor_util.make_ndarray(value.tensor)
    except (TypeError, ValueError):
        return None
    return float(array) if array.shape == () and array.dtype.kind in "fiu" else None
