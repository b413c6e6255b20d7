"""Checks of single settings: each error gives the value received, the rule and the fix."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

_STATIC = ("ascent_fraction", "m", "ascent_steps", "accumulation_steps", "batch_axis")


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
            f"Inside optax.inject_hyperparams, give static_args={_STATIC}."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the strings `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r} must be one of {choices}.")


def check_callable(name: str, value: Any, example: str) -> None:
    """Raise unless `value` is a function."""
    if not callable(value):
        raise TypeError(f"{name}={value!r} must be a function, such as {example}.")


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raise unless `dtype` is, or names, a real floating dtype."""
    try:
        valid = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        raise TypeError(f"{name}={dtype!r} must be a floating dtype such as jnp.bfloat16, or None.")


def check_axes(name: str, axes: Any) -> None:
    """Raise unless `axes` is one mesh axis name or a sequence of different ones."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name}={axes!r} must be the name of a mesh axis, or a tuple of names.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{name}={axes!r} must name one mesh axis or more, each once.")
