"""The aux of a whole batch, from the aux of its parts."""

from typing import Any

import jax
import jax.numpy as jnp

from ._checks import is_array
from ._reduction import share_of
from ._splitting import merge_axes, split_axis
from ._types import PyTree


def checked(aux: PyTree) -> PyTree:
    """Return the aux of a part of the batch, or raise if a leaf is no array or number."""
    for path, x in jax.tree_util.tree_leaves_with_path(aux):
        if not (is_array(x) or isinstance(x, bool | int | float | complex)):
            raise TypeError(
                f"aux{jax.tree_util.keystr(path)} is {x!r}. Where the batch is divided (m, "
                "group_axes, accumulation_steps), aux is put together from the parts', so it must "
                "be of arrays: leave the rest out of it."
            )
    return aux


def grown_axes(part: PyTree, whole: PyTree, parts: int) -> list[int]:
    """Return, for each leaf of aux, how the parts' make the batch's.

    Args:
      part: aux of one of `parts` equal parts of the batch: arrays, or their shapes and dtypes.
      whole: aux that the whole batch would give, likewise.
      parts: the number of parts.

    Returns:
      For each leaf the axis that grows with the batch, along which the parts' leaves are put
      together; or -1 for a floating leaf that does not grow, which is reduced as the loss is.

    Raises:
      TypeError: if a leaf is neither: it is not clear whether an integer is a count, a step or an
        identity.
    """

    def axis_of(path: Any, part: Any, whole: Any) -> int:
        if part.shape == whole.shape and jnp.issubdtype(part.dtype, jnp.inexact):
            return -1
        if part.ndim == whole.ndim:
            sizes = list(zip(part.shape, whole.shape, strict=True))
            grown = [i for i, (small, large) in enumerate(sizes) if small != large]
            if len(grown) == 1 and sizes[grown[0]][1] == parts * sizes[grown[0]][0]:
                return grown[0]
        raise TypeError(
            f"aux{jax.tree_util.keystr(path)} is {part.dtype}{list(part.shape)} for each of "
            f"{parts} parts of the batch and {whole.dtype}{list(whole.shape)} for the whole batch, "
            "so it is not clear how the parts' make the whole batch's. Give combine_aux=, a "
            "function from the aux with leaves stacked along a first axis, one entry for each "
            "part, to the aux of the batch."
        )

    leaves = jax.tree_util.tree_leaves_with_path(part)
    return [axis_of(*x, y) for x, y in zip(leaves, jax.tree.leaves(whole), strict=True)]


def put_together(stacked: PyTree, axes: list[int], shares: jax.Array, shards: int) -> PyTree:
    """Return the batch's aux from its parts', stacked along a first axis.

    Args:
      stacked: aux of the parts, one after another.
      axes: from `grown_axes`.
      shares: of each part in the batch's loss.
      shards: the number of data shards that each part took an equal share of.
    """

    def combine(parts: Any, axis: int) -> Any:
        if axis == -1:
            return jnp.sum(jax.vmap(share_of)(parts, shares), axis=0).astype(parts.dtype)
        # [part, .., shard, example of the part, ..] in the order of the batch.
        parts = split_axis(parts, axis + 1, (shards, parts.shape[axis + 1] // shards))
        parts = jnp.moveaxis(parts, 0, axis + 1)
        return merge_axes(merge_axes(parts, axis + 1), axis)

    leaves, structure = jax.tree.flatten(stacked)
    return structure.unflatten(map(combine, leaves, axes))
