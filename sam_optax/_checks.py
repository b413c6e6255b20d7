"""Checks of single settings: each error gives the value received, the rule and the fix."""

import inspect
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from ._types import PyTree

IN_INJECT_HYPERPARAMS = (
    " Inside optax.inject_hyperparams, all settings but rho must be static: give static_args="
    "set(inspect.signature(sam_optax.sharpness_aware).parameters) - {'rho'}."
)
"""Otherwise Optax makes arrays of numbers, and calls functions and dtypes with the step count."""

_NUMBERS_OF_A_STEP = (
    "ascent_fraction",
    "m",
    "ascent_steps",
    "accumulation_steps",
    "batch_axis",
    "data_shards",
)

_NO_SCHEDULE = (
    "what makes a schedule, and not the schedule, as optax.linear_schedule is without its "
    "arguments in (...)."
)

LARGEST, SMALLEST = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
"""A rho that is larger would be infinite, and one that is smaller zero."""


def check_rho(rho: Any) -> None:
    """Raise unless `rho` is a finite number of at least 0, or a scalar array."""
    if isinstance(rho, bool) or not (isinstance(rho, int | float) or is_array(rho)):
        of_a_function = (
            f" It is a function that a function of the step count returned: {_NO_SCHEDULE}"
        )
        raise TypeError(
            f"rho={rho!r} must be a number such as 0.15, or, where steps are counted, a function "
            f"of the step count.{of_a_function if callable(rho) else ''}"
        )
    if not is_real_scalar(rho):
        raise ValueError(
            f"rho must be a real scalar, but it is an array of shape {jnp.shape(rho)} and dtype "
            f"{getattr(rho, 'dtype', None)}. One rho serves every parameter; to leave some out, "
            "give perturb=."
        )
    if isinstance(rho, Tracer):
        return
    if not 0 <= (rho if isinstance(rho, int) else float(rho)) <= LARGEST:
        raise ValueError(
            f"rho={rho!r} must be finite and at least 0, in float32 too, such as 0.15."
        )


def check_schedule(rho: Any) -> None:
    """Raise unless the function `rho` can be called with a step count."""
    try:
        inspect.signature(rho, follow_wrapped=False).bind(0)
    except ValueError:  # it does not say what it takes
        return
    except TypeError as error:
        raise TypeError(
            f"rho={rho!r} must be a number such as 0.15, or a function of the step count, but this "
            f"function cannot be called with that alone ({error}): {_NO_SCHEDULE}"
        ) from None


def check_ascent_fraction(ascent_fraction: Any) -> None:
    """Raise unless `ascent_fraction` is a Python or NumPy number in (0, 1]."""
    check_number("ascent_fraction", ascent_fraction, example=0.25)
    if not 0 < ascent_fraction <= 1:
        raise ValueError(
            f"ascent_fraction={ascent_fraction!r} must be in (0, 1]: it is the share of the batch "
            "that the ascent gradient is taken on. 1 is the whole batch; for the plain step, say "
            "rho=0."
        )


def check_number(name: str, value: Any, example: float) -> None:
    """Raise unless `value` is a real number, of Python or NumPy."""
    _check_static(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number such as {example}.")


def check_integer(name: str, value: Any, at_least: int | None = None) -> None:
    """Raise unless `value` is an integer, of Python or NumPy, and at least `at_least`."""
    _check_static(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an integer.")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}={value!r} must be at least {at_least}.")


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an integer of which `jax.random.key` uses every bit."""
    check_integer("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be in [0, 2**32), such as 0.")


def is_static_zero(rho: Any) -> bool:
    """Whether `rho` is the number 0, known before compilation."""
    return not isinstance(rho, Tracer) and float(rho) == 0


def _check_static(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, known before compilation, but it is {value!r}."
            f"{IN_INJECT_HYPERPARAMS if name in _NUMBERS_OF_A_STEP else ''}"
        )


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is a bool: any other value would count as yes or no silently."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_choice(name: str, value: Any, choices: tuple[str, ...], otherwise: str = "") -> None:
    """Raise unless `value` is one of the strings `choices`."""
    if not (isinstance(value, str) and value in choices):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}={value!r} must be one of {choices}{otherwise}.")


def check_callable(name: str, value: Any, example: str) -> None:
    """Raise unless `value` is a function."""
    if not callable(value):
        raise TypeError(f"{name}={value!r} must be a function, such as {example}.")


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raise unless `dtype` is, or names, a real floating dtype."""
    try:
        valid = not is_array(dtype) and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (SyntaxError, TypeError, ValueError):  # NumPy's, of strings
        valid = False
    if not valid:
        raise TypeError(
            f"{name}={dtype!r} must be a floating dtype, jnp.bfloat16 or 'bfloat16', say, or None."
            f"{IN_INJECT_HYPERPARAMS if isinstance(dtype, jax.Array) else ''}"
        )


def check_axes(name: str, axes: Any) -> None:
    """Raise unless `axes` is one mesh axis name or a sequence of different ones."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name}={axes!r} must be the name of a mesh axis, or a tuple of names.")
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{name}={axes!r} must name one mesh axis or more, each once.")


def check_mesh(mesh: Any) -> None:
    """Raise unless `mesh` is a mesh or `None`."""
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh={mesh!r} must be a jax.sharding.Mesh.")


def check_gradient(what: str, grads: PyTree, params: PyTree) -> None:
    """Raise unless each leaf of `grads`, a tree like `params`, can be its parameter's gradient.

    What stands in the place of an integer, which has no gradient, does not matter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_none)
    for (path, g), w in zip(leaves, jax.tree.leaves(params, is_leaf=is_none), strict=True):
        if g is None or not is_inexact(w):
            continue
        kind = jnp.inexact if jnp.iscomplexobj(w) else jnp.floating
        if not is_array(g) or g.shape != jnp.shape(w) or not jnp.issubdtype(g.dtype, kind):
            raise TypeError(
                f"{what} must have, for each parameter, an array of its shape and of "
                f"{kind.__name__} dtype, but for params{jax.tree_util.keystr(path)}, "
                f"{jnp.result_type(w)}{list(jnp.shape(w))}, it has "
                f"{f'{g.dtype}{list(g.shape)}' if is_array(g) else repr(g)}."
            )


def is_array(x: Any) -> bool:
    """Whether `x` is an array of JAX or NumPy, or traced."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_inexact(w: Any) -> bool:
    """Whether `w` is a real or complex number or array, which has a gradient."""
    if isinstance(w, float | complex):
        return True
    return hasattr(w, "dtype") and bool(jnp.issubdtype(w.dtype, jnp.inexact))


def is_real_scalar(x: Any) -> bool:
    """Whether `x` is a real number, or an array of one."""
    if not is_array(x):
        return isinstance(x, int | float) and not isinstance(x, bool)
    kinds = (jnp.floating, jnp.integer)
    return x.shape == () and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def is_none(x: Any) -> bool:
    """Whether `x` is `None`, which as a leaf of a tree stands for nothing there."""
    return x is None
