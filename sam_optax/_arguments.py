"""Which arguments of a loss are parameters, and which hold the examples that are divided."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_integer, is_array
from ._types import PyTree


def argument_numbers(argnums: Any, batch_argnums: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of the arguments that are parameters, and of those that hold examples.

    Raises:
      ValueError: if an argument is both, or it is not clear where the examples are.
      TypeError: if something is no number.
    """
    of_params = _as_argnums("argnums", argnums)
    of_batch = _as_argnums("batch_argnums", 1 if batch_argnums is None else batch_argnums)
    if batch_argnums is None and of_params != (0,):
        raise ValueError(
            f"argnums={argnums!r}: where the parameters are not just the first argument of "
            "loss_fn, the batch may be any other. Say in batch_argnums which arguments hold "
            "examples."
        )
    if set(of_params) & set(of_batch):
        raise ValueError(
            f"argnums={argnums!r} and batch_argnums={batch_argnums!r} both name an argument of "
            "loss_fn: it is either parameters or examples."
        )
    return of_params, of_batch


def check_given(
    what: str, name: str, nums: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise unless the arguments of these numbers are given by position."""
    if max(nums) >= len(args):
        raise TypeError(
            f"The {what} must be given as positional argument {max(nums)} ({name}={nums!r}), but "
            f"there are {len(args)} positional arguments and the keywords {sorted(kwargs)}. A loss "
            "that closes over its batch must be given it as an argument."
        )


def refuse_other_examples(
    loss_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch_axis: int
) -> None:
    """Raise if what looks like examples would not be divided with argument 1, the batch."""
    _refuse_another_batch(loss_fn, len(args), kwargs)
    _refuse_more_examples(args[1:], kwargs, batch_axis)


def _as_argnums(name: str, argnums: Any) -> tuple[int, ...]:
    one = isinstance(argnums, str) or not isinstance(argnums, Sequence)
    nums: Any = (argnums,) if one else tuple(argnums)
    for i in nums:
        check_integer(name, i, at_least=0)
    if not nums or len(set(nums)) < len(nums):
        raise ValueError(f"{name}={argnums!r} must name one argument or more, once.")
    return tuple(int(i) for i in nums)


def _refuse_another_batch(loss_fn: Callable[..., Any], given: int, kwargs: dict[str, Any]) -> None:
    """Raise if `loss_fn` has its batch, by its own word, after the argument that is divided."""
    if "batch" in kwargs:
        raise ValueError(
            "loss_fn is given its batch by keyword, and the ascent would take its part of argument "
            "1. Give it by position, and say in batch_argnums at which; if argument 1 alone holds "
            "examples, give batch_argnums=1."
        )
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # a function that has none
        return
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [x.name for x in parameters if x.kind in by_position][:given]
    if "batch" in names[2:]:
        i = names.index("batch")
        raise ValueError(
            f"loss_fn has its batch as argument {i}, and the ascent would take its part of "
            f"argument 1, {names[1]!r}. Give batch_argnums={i}, or the numbers of all arguments "
            "that hold examples; if argument 1 alone does, batch_argnums=1."
        )


def _refuse_more_examples(args: tuple[Any, ...], kwargs: dict[str, Any], batch_axis: int) -> None:
    """Raise if labels come after the inputs and only the inputs would be divided."""
    rows = [_rows(arg, batch_axis) for arg in args]
    if rows[0] in (set(), {0}):
        return
    alike = tuple(i for i, sizes in enumerate(rows, start=1) if sizes == rows[0])
    # A tree of vectors that is given by keyword is a model's statistics.
    named = [
        name
        for name, arg in kwargs.items()
        if _rows(arg, batch_axis) == rows[0]
        and (is_array(arg) or any(jnp.ndim(x) > 1 for x in jax.tree.leaves(arg)))
    ]
    if named:
        raise ValueError(
            f"The keyword arguments {named} of loss_fn have {min(rows[0])} rows along batch_axis="
            f"{batch_axis}, as the batch has. If they belong to the examples, give them by "
            "position and list them in batch_argnums, so that the ascent takes its part of each; "
            "if not, give batch_argnums=1."
        )
    if len(alike) > 1:
        raise ValueError(
            f"The arguments {alike} of loss_fn all have {min(rows[0])} rows along batch_axis="
            f"{batch_axis}. If they belong to the examples, give batch_argnums={alike}, so that "
            "the ascent takes its part of each; if not, batch_argnums=1."
        )
    _refuse_a_batch_behind(args, rows)


def _refuse_a_batch_behind(args: tuple[Any, ...], rows: list[set[int]]) -> None:
    """Raise if what comes after argument 1 looks more like a batch, as inputs and labels do."""
    later = [
        (i, min(sizes))
        for i, sizes in enumerate(rows, start=1)
        if len(sizes) == 1 and sizes != rows[0] and sizes != {1}
    ]
    for _, b in later:
        alike = tuple(i for i, size in later if size == b)
        enough = 1 if rows[0] == {1} else 2
        is_matrix = any(jnp.ndim(x) > 1 for i in alike for x in jax.tree.leaves(args[i - 1]))
        if len(alike) >= enough and is_matrix:
            raise ValueError(
                f"The ascent would take its part of argument 1 of loss_fn, whose rows are "
                f"{sorted(rows[0])}, and the arguments {alike} have {b} rows each. If they are the "
                f"batch, give batch_argnums={alike}; if argument 1 is, batch_argnums=1."
            )


def _rows(tree: PyTree, axis: int) -> set[int]:
    """Return the sizes along `axis` of all arrays but old-style random keys."""
    arrays = [x for x in jax.tree.leaves(tree) if is_array(x) and -x.ndim <= axis < x.ndim]
    keys = [((size,), jnp.dtype("uint32")) for size in (2, 4)]
    return {x.shape[axis] for x in arrays if (x.shape, x.dtype) not in keys}
