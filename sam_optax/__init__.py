"""Sharpness-Aware Minimization for JAX.

`value_and_grad` is SAM as a gradient, `sharpness_aware` is SAM as an Optax optimizer. The algorithm
is in `_step.py`.
"""

import importlib
import types
import typing

from ._info import SharpnessInfo as SharpnessInfo
from ._microbatch import ascent_batch as ascent_batch
from ._microbatch import ascent_groups as ascent_groups
from ._perturbation import adaptive_perturbation as adaptive_perturbation
from ._perturbation import gradient_perturbation as gradient_perturbation
from ._sharpness_aware import ScheduledSharpnessState as ScheduledSharpnessState
from ._sharpness_aware import sharpness_aware as sharpness_aware
from ._types import Perturbation as Perturbation
from ._value_and_grad import value_and_grad as value_and_grad

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from . import sharpness as sharpness


def __getattr__(name: str) -> types.ModuleType:
    """Import `sharpness` when it is first asked for: no train step needs it."""
    if name == "sharpness":
        return importlib.import_module("sam_optax.sharpness")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
