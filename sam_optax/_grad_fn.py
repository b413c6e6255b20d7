"""What a user's `grad_fn` returns, told apart by its structure."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_gradient, is_array, is_real_scalar
from ._types import Evaluate, Evaluation, PyTree


def evaluate_with(grad_fn: Callable[..., Any], *, keeps_aux: bool) -> Evaluate:
    """Return `grad_fn` as a pass that gives an `Evaluation`.

    `grad_fn` may be `jax.grad(loss)` or `jax.value_and_grad(loss)`, with aux or not: a gradient
    has the structure of `params`, and no pair whose second part has it can have it too. What
    `jax.grad(loss, has_aux=True)` returns, a pair whose first part has it, is refused, but where
    `params` is one bare scalar and the aux another: then nothing tells it from `(value, gradient)`.

    Args:
      grad_fn: the user's function.
      keeps_aux: whether the caller hands aux on. If not, an aux raises: it must not get lost.
    """

    def evaluate(params: PyTree, *batch: PyTree) -> Evaluation:
        structure, result = jax.tree.structure(params), grad_fn(params, *batch)
        if jax.tree.structure(result) == structure:
            check_gradient("The gradient that grad_fn returns", result, params)
            return Evaluation(None, None, _arrays(result))
        if isinstance(result, tuple) and len(result) == 2:
            value: Any
            value, grads = result
            loss: Any
            loss, aux = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
            if jax.tree.structure(grads) == structure:
                _check_loss(loss)
                check_gradient("The gradient that grad_fn returns", grads, params)
                if aux is not None and not keeps_aux:
                    raise ValueError(
                        "grad_fn returns an aux, which update would lose. Call "
                        "update(..., return_info=True) and read info.aux (nnx.Optimizer cannot: "
                        "there give it the gradient of sam_optax.value_and_grad), or take the "
                        "gradient of a loss without aux."
                    )
                return Evaluation(jnp.asarray(loss), aux, _arrays(grads))
        raise TypeError(
            "grad_fn must return a gradient with the structure of params, or (value, gradient) as "
            "jax.value_and_grad does (with has_aux, ((value, aux), gradient)). The structure of "
            f"params is {structure}, but grad_fn returned {jax.tree.structure(result)}."
        )

    return evaluate


def as_optax_calls_it(grad_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `grad_fn(params, i)`, as for `optax.contrib.sam`, as a `grad_fn(params)`.

    The two calls say the same there: `i` numbers the points after the first, from 0. It is known by
    its name, `i`, or one that begins with `_`: a batch that was forgotten is neither.
    """
    try:
        parameters = inspect.signature(grad_fn).parameters.values()
    except (TypeError, ValueError):  # a function that has none
        return grad_fn
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [x.name for x in parameters if x.kind in by_position and x.default is x.empty]
    if len(needed) != 2 or not (needed[1] == "i" or needed[1].startswith("_")):
        return grad_fn
    number = itertools.count()
    return lambda params: grad_fn(params, next(number))


def _arrays(grads: PyTree) -> PyTree:
    """Return `grads` with arrays for the numbers that may stand in the place of integer leaves."""
    return jax.tree.map(lambda g: g if is_array(g) else jnp.asarray(g), grads)


def _check_loss(loss: Any) -> None:
    if not is_real_scalar(loss):
        raise TypeError(
            "grad_fn must return a gradient, or (value, gradient) as jax.value_and_grad does, with "
            f"a real scalar, or (scalar, aux), as value, but the scalar is {loss!r}."
        )
