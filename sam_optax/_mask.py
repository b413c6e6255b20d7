"""Which parameters are perturbed: the `perturb=` mask or predicate."""

from collections.abc import Callable
from typing import Any

import jax

from ._checks import IN_INJECT_HYPERPARAMS, is_array, is_inexact
from ._types import PyTree

# In Flax's FP8 the gradient of what is under this key is its new value: scales, past maxima.
_OVERWRITTEN = "_overwrite_with_gradient"

_MAKE_A_BOOL = " It must be known before compilation: make it a Python bool with bool(...)."


def perturbed_mask(perturb: Callable[[str], bool] | PyTree | None, params: PyTree) -> list[bool]:
    """Return which leaves of `params` are perturbed, one after another.

    Leaves that have no gradient (integers, booleans, PRNG keys) are never perturbed, nor are FP8's
    scales, whose gradient is none. No tree like `params`: of bools a class of the user's might
    refuse to be one.

    Args:
      perturb: `None` for every leaf; a predicate on the leaf's path, such as
        `lambda path: "layer_norm" in path` for the path `"encoder/layer_norm/scale"`; or a tree of
        bools like `params`, in which a bool may stand for a whole subtree.
      params: the parameters.

    Raises:
      ValueError: if the mask does not fit `params`, or selects nothing.
      TypeError: if the predicate returns something other than a bool.
    """
    has_gradient = [
        is_inexact(w) and not _is_overwritten(path)
        for path, w in jax.tree_util.tree_leaves_with_path(params)
    ]
    if perturb is None:
        return has_gradient
    choose = _from_predicate if _is_predicate(perturb) else _from_tree
    chosen = choose(perturb, params)
    mask = [moves and can for moves, can in zip(chosen, has_gradient, strict=True)]
    if mask and not any(mask):
        raise ValueError(
            f"perturb={perturb!r} selects none of the parameters {_some(_paths(params))}. Select "
            "at least one, or say rho=0 if the plain step is meant."
            f"{IN_INJECT_HYPERPARAMS if perturb is False else ''}"
        )
    return mask


def check_perturb(perturb: Any) -> None:
    """Raise unless `perturb` is one of what `perturbed_mask` takes, whatever the parameters are."""
    if perturb is None or _is_predicate(perturb):
        return
    for path, moves in jax.tree_util.tree_leaves_with_path(perturb):
        if not isinstance(moves, bool):
            raise TypeError(
                f"perturb must be a predicate on paths or a tree of bools, but at "
                f"{jax.tree_util.keystr(path) or 'its root'} it holds {moves!r}."
                f"{_MAKE_A_BOOL if _is_bool_array(moves) else ''}"
            )


def refuse_overwritten(params: PyTree) -> None:
    """Raise if some leaves' gradients are new values, which are not the means over parts."""
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if _is_overwritten(path):
            raise ValueError(
                f"The gradient of params{jax.tree_util.keystr(path)} is its new value (FP8), and "
                "m, group_axes and accumulation_steps would make it the mean of several: leave "
                "them out. On a mesh data_axes needs none of them."
            )


def keep(mask: list[bool], tree: PyTree) -> list[Any]:
    """Return the leaves of `tree`, with `None` in place of those that `mask` leaves out."""
    return [x if moves else None for moves, x in zip(mask, jax.tree.leaves(tree), strict=True)]


def _is_overwritten(path: Any) -> bool:
    return any(
        _OVERWRITTEN in (getattr(key, "key", None), getattr(key, "name", None)) for key in path
    )


def _is_predicate(perturb: Any) -> bool:
    # Not all that can be called: Equinox's models can, and one of bools is a mask of the model.
    leaves = jax.tree.leaves(perturb)
    return callable(perturb) and not (leaves and all(isinstance(x, bool) for x in leaves))


def _is_bool_array(x: Any) -> bool:
    return is_array(x) and x.dtype == bool


def _paths(params: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _from_predicate(predicate: Callable[..., Any], params: PyTree) -> list[bool]:
    chosen = []
    for path in _paths(params):
        moves = predicate(path)
        if not isinstance(moves, bool):
            raise TypeError(
                f"perturb(path) must return a bool, but it returned {moves!r} for the path "
                f"{path!r}.{_MAKE_A_BOOL if _is_bool_array(moves) else ''}"
            )
        chosen.append(moves)
    return chosen


def _from_tree(tree: PyTree, params: PyTree) -> list[bool]:
    if tree is True and not jax.tree_util.all_leaves([params]):
        raise TypeError(
            "perturb=True is one bool for all of the parameters. Give a predicate on their paths "
            f"or a tree of bools, or leave it out to perturb them all.{IN_INJECT_HYPERPARAMS}"
        )
    try:
        bools, structure = jax.tree.flatten(tree)
        below = [len(jax.tree.leaves(x)) for x in structure.flatten_up_to(params)]
        return [moves for moves, n in zip(bools, below, strict=True) for _ in range(n)]
    except ValueError as error:
        raise ValueError(
            f"The tree given as perturb does not fit the parameters: {error} It must have their "
            "structure, or a bool in place of a whole subtree."
        ) from error


def _some(paths: list[str]) -> str:
    return ", ".join(repr(p) for p in paths[:5]) + (", ..." if len(paths) > 5 else "")
