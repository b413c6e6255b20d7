"""Sharpness-Aware Minimization for JAX.

`value_and_grad` is SAM as a gradient, `sharpness_aware` is SAM as an Optax optimizer. The algorithm
is in `_step.py`.
"""

import importlib
import types
import typing

from ._info import SharpnessInfo
from ._microbatch import ascent_batch, ascent_groups
from ._perturbation import adaptive_perturbation, gradient_perturbation
from ._sharpness_aware import ScheduledSharpnessState, sharpness_aware
from ._types import Perturbation
from ._value_and_grad import value_and_grad

__version__ = "0.1.0"

__all__ = [
    "Perturbation",
    "ScheduledSharpnessState",
    "SharpnessInfo",
    "adaptive_perturbation",
    "ascent_batch",
    "ascent_groups",
    "gradient_perturbation",
    "sharpness",
    "sharpness_aware",
    "value_and_grad",
]

if typing.TYPE_CHECKING:
    from . import sharpness


def __getattr__(name: str) -> types.ModuleType:
    """Import `sharpness` when it is first asked for: no train step needs it."""
    if name == "sharpness":
        return importlib.import_module("sam_optax.sharpness")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
