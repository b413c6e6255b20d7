"""The settings of a SAM step, checked as soon as they are given."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._microbatch import MSharpness
from ._types import Perturbation, PyTree

LossReduction = Literal["mean", "sum"] | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What `value_and_grad` and `sharpness_aware` have in common; they document each field."""

    rho: Any = 0.15
    ascent_fraction: float = 0.25
    m: int = 1
    m_sharpness: MSharpness = "paper"
    loss_reduction: LossReduction = "mean"
    combine_aux: Callable[[PyTree], PyTree] | None = None
    ascent_steps: int = 1
    perturbation: Perturbation | None = None
    perturb: Callable[[str], bool] | PyTree | None = None
    adversarial_dtype: Any = None
    batch_axis: int = 0
    data_shards: int = 1

    def __post_init__(self) -> None:
        """Raise on the first field that cannot be meant."""
        check_rho(self.rho)
        check_ascent_fraction(self.ascent_fraction)
        check_integer("m", self.m, at_least=1)
        check_integer("ascent_steps", self.ascent_steps, at_least=1)
        check_integer("data_shards", self.data_shards, at_least=1)
        check_integer("batch_axis", self.batch_axis)
        _check_choice("m_sharpness", self.m_sharpness, ("paper", "foret"))
        if not callable(self.loss_reduction):
            _check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        if self.perturbation is not None:
            _check_callable("perturbation", self.perturbation, "sam_optax.gradient_perturbation")
        if self.combine_aux is not None:
            _check_callable("combine_aux", self.combine_aux, "lambda aux: jax.tree.map(...)")
        if self.adversarial_dtype is not None:
            _check_float_dtype(self.adversarial_dtype)


def check_rho(rho: Any) -> None:
    """Raise unless `rho` is a finite number of at least 0, a scalar array or a schedule."""
    if callable(rho):
        return
    if isinstance(rho, bool) or not (isinstance(rho, int | float) or hasattr(rho, "dtype")):
        raise TypeError(
            f"rho={rho!r} must be a number such as 0.15, or a function of the step count."
        )
    dtype = jnp.result_type(rho)
    if jnp.shape(rho) != () or not any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
    ):
        raise ValueError(
            f"rho must be a real scalar, but it is an array of shape {jnp.shape(rho)} and dtype "
            f"{dtype}. One rho serves every parameter; to leave some out, give perturb=."
        )
    if not isinstance(rho, Tracer) and not 0 <= float(rho) < math.inf:
        raise ValueError(f"rho={rho!r} must be finite and at least 0, such as 0.15.")


def check_ascent_fraction(ascent_fraction: Any) -> None:
    """Raise unless `ascent_fraction` is a Python number in (0, 1]."""
    _check_static("ascent_fraction", ascent_fraction)
    if isinstance(ascent_fraction, bool) or not isinstance(ascent_fraction, int | float):
        raise TypeError(f"ascent_fraction={ascent_fraction!r} must be a number such as 0.25.")
    if not 0 < ascent_fraction <= 1:
        raise ValueError(
            f"ascent_fraction={ascent_fraction!r} must be in (0, 1]: it is the share of the batch "
            "that the ascent gradient is taken on. 1 is the whole batch; for the plain step, say "
            "rho=0."
        )


def check_integer(name: str, value: Any, at_least: int | None = None) -> None:
    """Raise unless `value` is a Python integer, and at least `at_least`."""
    _check_static(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an integer.")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}={value!r} must be at least {at_least}.")


def is_static_zero(rho: Any) -> bool:
    """Whether `rho` is the number 0, known before compilation."""
    return not isinstance(rho, Tracer) and float(rho) == 0


def _check_static(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, known before compilation, but it is {value!r}. "
            f"Inside optax.inject_hyperparams, name it in static_args=({name!r}, ...)."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r} must be one of {choices}.")


def _check_callable(name: str, value: Any, example: str) -> None:
    if not callable(value):
        raise TypeError(f"{name}={value!r} must be a function, such as {example}.")


def _check_float_dtype(dtype: Any) -> None:
    try:
        valid = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        raise TypeError(
            f"adversarial_dtype={dtype!r} must be a floating dtype such as jnp.bfloat16, or None."
        )
