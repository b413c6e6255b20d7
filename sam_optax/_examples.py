"""How many examples a batch has, after checking that it is made of examples."""

import reprlib
import sys
from typing import Any

import jax

from ._types import PyTree


def examples(batch: PyTree, axis: int) -> int:
    """Return b, the number of examples along `axis`, after checking that all leaves agree."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = "batch" + jax.tree_util.keystr(path)
        # A table of pandas has `ndim` and no dtype.
        is_array = hasattr(leaf, "ndim") and hasattr(leaf, "dtype")
        if not is_array or isinstance(leaf, jax.ShapeDtypeStruct):
            if isinstance(leaf, bool | int | float | complex):
                continue  # a scalar, of rank 0
            raise TypeError(
                f"{name} is {reprlib.repr(leaf)}, a {type(leaf).__name__} and not an array: "
                + ("leave it out of the batch." if path else "give an array, or a dict of arrays.")
            )
        if leaf.ndim == 0:
            continue
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"{name} has the shape {leaf.shape}, which has no axis batch_axis={axis}."
            )
        sizes[name] = leaf.shape[axis]
    _refuse_lists_of_examples(batch, set(sizes.values()))
    if not sizes:
        raise ValueError(
            "The batch has no array with a batch axis, so there are no examples to take the ascent "
            "micro-batch from. Of value_and_grad, batch_argnums says which arguments hold them; "
            "a loss that closes over its batch must be given it as an argument."
        )
    if len(set(sizes.values())) > 1:
        refuse_sparse(batch)
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"The batch's arrays have different numbers of examples along batch_axis={axis}: "
            f"{listed}. They must agree; pass what is not per example as another argument (of "
            "value_and_grad, batch_argnums says which arguments hold examples)."
        )
    b = next(iter(sizes.values()))
    if b == 0:
        raise ValueError("The batch has no examples: b=0 along batch_axis. It needs at least one.")
    return b


def refuse_sparse(batch: PyTree) -> None:
    """Raise if a matrix is sparse: its arrays have a row for each number in it, not an example."""
    sparse: Any = sys.modules.get("jax.experimental.sparse")  # not imported, then there is none
    if sparse is None:
        return

    def is_sparse(x: Any) -> bool:
        return isinstance(x, sparse.JAXSparse)

    for path, x in jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_sparse):
        if is_sparse(x):
            raise TypeError(
                f"batch{jax.tree_util.keystr(path)} is sparse, {x!r}, which cannot be divided into "
                "examples: give x.todense(), or ascent_fraction=1 and no groups."
            )


def _refuse_lists_of_examples(batch: PyTree, sizes: set[int]) -> None:
    """Raise if a list or tuple has a number for each example: to JAX it is a tree of scalars."""

    def has_arrays(x: Any) -> bool:
        return any(getattr(y, "ndim", 0) for y in jax.tree.leaves(x))

    def is_list_of_scalars(x: Any) -> bool:
        is_list = isinstance(x, list) or type(x) is tuple  # a named one is a record
        return is_list and not has_arrays(x)

    # Beside a list with an array for each example, one with its label.
    lists = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, list))
    sizes = sizes | {len(x) for x in lists if isinstance(x, list) and len(x) > 1 and has_arrays(x)}
    for path, x in jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_list_of_scalars):
        if not isinstance(x, list | tuple):
            continue
        if len(x) in sizes or (x and not sizes and isinstance(x, list)):
            raise TypeError(
                f"batch{jax.tree_util.keystr(path)} is a {type(x).__name__} of {len(x)} entries "
                "without an array among them. If they are the examples', make it one array: "
                "jnp.asarray(...)."
            )
