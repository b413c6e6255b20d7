"""Which examples take part in the ascent: Algorithm 1, line 5."""

import reprlib
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._checks import (
    check_ascent_fraction,
    check_axes,
    check_choice,
    check_integer,
    check_mesh,
)
from ._division import Division
from ._layout import Axes, batch_layout, names_in
from ._types import PyTree

MSharpness = Literal["paper", "foret"]


def ascent_batch(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
) -> PyTree:
    """Return the ascent micro-batch M: the examples that the ascent gradient is taken on.

    M has `a` examples, `ascent_fraction` of the batch's `b`, rounded to a multiple of the data
    shards (a half up, so 3 of 10 at 1/4) and at least one from each. They are the first `a` of the
    batch, or, where the batch is laid out over D data shards, the first `a / D` of *each* shard, so
    that no example leaves its device. On a mesh with explicit axes D is in the batch's type; on
    other meshes name the axes.

    Args:
      batch: pytree of arrays that have `b` examples along `batch_axis`. Leaves of rank 0 belong to
        every example and are returned as they are.
      ascent_fraction: share of the batch in (0, 1]. At 1 the batch itself is returned.
      batch_axis: the axis of the examples, the same in every leaf.
      data_axes: the mesh axes that the batch axis is sharded over, major first.
      mesh: the mesh of `data_axes`; by default the one of `jax.set_mesh`.
      data_shards: D itself, in place of `data_axes`: as many equal contiguous blocks.

    Returns:
      A tree like `batch` with `a` examples along `batch_axis`. NumPy arrays stay NumPy arrays.

    Raises:
      ValueError: if a setting is out of its range, no leaf has a batch axis, `b` is zero, the
        leaves disagree on it, it is not a multiple of the data shards, or axes are named and there
        is no mesh, or not these axes.
      TypeError: if a setting is of the wrong type, or a leaf is not an array.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> sam_optax.ascent_batch({"x": jnp.arange(8)}, 0.5)
      {'x': Array([0, 1, 2, 3], dtype=int32)}
      >>> sam_optax.ascent_batch({"x": jnp.arange(8)}, 0.5, data_shards=2)
      {'x': Array([0, 1, 4, 5], dtype=int32)}

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, Algorithm 1 and section 4.1.
    """
    check_ascent_fraction(ascent_fraction)
    check_slicing(batch_axis, data_axes, mesh, data_shards)
    shards = batch_layout(
        batch, batch_axis=batch_axis, data_axes=data_axes, mesh=mesh, data_shards=data_shards
    ).shards
    return take_ascent_batch(batch, ascent_fraction, batch_axis, shards)


def ascent_groups(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    m: int,
    m_sharpness: MSharpness = "paper",
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Return the m ascent micro-batches, and what each is paired with.

    Every group takes an equal share of every data shard.

    Args:
      batch: as for `ascent_batch`.
      ascent_fraction: as for `ascent_batch`; the share of all m micro-batches together.
      m: the number of groups.
      m_sharpness: `"paper"` splits the ascent micro-batch M into m groups and pairs each with the
        whole batch. `"foret"` splits the batch into m parts and takes group i from part i.
      batch_axis: as for `ascent_batch`.
      data_axes: as for `ascent_batch`.
      mesh: as for `ascent_batch`.
      data_shards: as for `ascent_batch`.

    Returns:
      Two trees like `batch` whose leaves have a new first axis of size m: the ascent micro-batches
      of `a / m` examples, and the parts of the batch of `b / m` examples (`None` for `"paper"`).
      Leaves of rank 0 are repeated along it.

    Raises:
      ValueError: as `ascent_batch`; if `a`, or for `"foret"` also `b`, cannot be shared out
        evenly over the groups and shards.
      TypeError: as `ascent_batch`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, parts = sam_optax.ascent_groups(jnp.arange(8), 0.5, m=2, m_sharpness="foret")
      >>> ascent.tolist(), parts.tolist()
      ([[0, 1], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7]])

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, section 4.1 for `"paper"`; Foret et al.,
      `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, section 4.1 for `"foret"`.
    """
    check_ascent_fraction(ascent_fraction)
    check_integer("m", m, at_least=1)
    check_choice("m_sharpness", m_sharpness, ("paper", "foret"))
    check_slicing(batch_axis, data_axes, mesh, data_shards)
    shards = batch_layout(
        batch, batch_axis=batch_axis, data_axes=data_axes, mesh=mesh, data_shards=data_shards
    ).shards
    return take_ascent_groups(batch, ascent_fraction, batch_axis, shards, int(m), m_sharpness)


def take_ascent_groups(
    batch: PyTree,
    ascent_fraction: float,
    axis: int,
    shards: int,
    m: int,
    m_sharpness: MSharpness,
) -> tuple[PyTree, PyTree]:
    """Return the groups of a batch that lies on `shards` contiguous blocks; see `ascent_groups`."""
    parts = m if m_sharpness == "foret" else 1
    taken = _take(batch, Division(shards, ascent_fraction, m, parts), axis)
    ascent = split_within_shards(taken, m, axis, shards)
    return ascent, split_within_shards(batch, m, axis, shards) if m_sharpness == "foret" else None


def take_ascent_batch(batch: PyTree, ascent_fraction: float, axis: int, shards: int) -> PyTree:
    """Return the first examples of each of `shards` contiguous blocks; see `ascent_batch`."""
    return _take(batch, Division(shards, ascent_fraction), axis)


def check_slicing(batch_axis: Any, data_axes: Any, mesh: Any, data_shards: Any) -> None:
    """Raise unless these say where the examples are, and how they are sharded."""
    check_integer("batch_axis", batch_axis)
    check_mesh(mesh)
    if data_shards is not None:
        check_integer("data_shards", data_shards, at_least=1)
    if data_axes is None:
        return
    check_axes("data_axes", data_axes)
    if data_shards is not None:
        raise ValueError(
            f"data_axes={data_axes!r} and data_shards={data_shards!r} both say how the batch is "
            "sharded: give one of them."
        )


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


def _take(batch: PyTree, division: Division, axis: int) -> PyTree:
    """Return the first `a` examples of the batch, as many of each part of each shard."""
    b = examples(batch, axis)
    division.check(b)
    a, blocks = division.ascent_size(b), division.shards * division.parts
    if a == b:
        return batch

    def take(x: Any, axis: int) -> Any:
        x = split_axis(x, axis, (blocks, b // blocks))
        x = x[(slice(None),) * (axis + 1) + (slice(a // blocks),)]
        return _apart(merge_axes(x, axis))

    def take_prefix(x: Any, axis: int) -> Any:
        return _apart(x[(slice(None),) * axis + (slice(a),)])

    return _map(take_prefix if blocks == 1 else take, batch, axis)


def _apart(x: Any) -> Any:
    """Return a part of an array such that XLA does not lay out the whole as the part is wanted.

    On TPUs it would copy a batch of images to a layout with the three channels padded to 128, for
    the convolution over a quarter of them, and keep the copy until the descent's backward pass.
    """
    return jax.lax.optimization_barrier(x) if isinstance(x, jax.Array) and x.ndim > 2 else x


def split_within_shards(batch: PyTree, m: int, axis: int, shards: int) -> PyTree:
    """Return `batch` as m parts, each with an equal share of every data shard."""

    def split(x: Any, axis: int) -> Any:
        x = split_axis(x, axis, (shards, m, x.shape[axis] // (shards * m)))
        return merge_axes(jnp.moveaxis(x, axis + 1, 0), axis + 1)

    return _map(split, batch, axis, scalar=lambda x: jnp.broadcast_to(x, (m,)))


def _map(fn: Any, batch: PyTree, axis: int, scalar: Any = lambda x: x) -> PyTree:
    refuse_sparse(batch)

    def leaf(x: Any) -> Any:
        return fn(x, axis % x.ndim) if getattr(x, "ndim", 0) else scalar(x)

    return jax.tree.map(leaf, batch)


def split_axis(x: Any, axis: int, sizes: tuple[int, ...]) -> Any:
    """Return `x` with `axis` as axes of these sizes, the first of them sharded like `axis`."""
    shape = x.shape[:axis] + sizes + x.shape[axis + 1 :]
    sharding = _sharded_in_the_first(x, axis, len(sizes))
    return x.reshape(shape) if sharding is None else x.reshape(shape, out_sharding=sharding)


def merge_axes(x: Any, axis: int) -> Any:
    """Return `x` with `axis` and the next as one."""
    # Not with -1, which JAX cannot work out where another axis has the size 0.
    merged = x.shape[axis] * x.shape[axis + 1]
    return x.reshape((*x.shape[:axis], merged, *x.shape[axis + 2 :]))


def _sharded_in_the_first(x: Any, axis: int, parts: int) -> NamedSharding | None:
    """Return what keeps explicit mesh axes on the first part of `axis`, where JAX would not.

    It puts those of size 1 on another part; but a part that a loop goes over can have none, and
    the batch axis is to keep its own.
    """
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if all(sharding.mesh.shape[name] > 1 for name in names_in(spec[axis])):
        return None
    spec[axis + 1 : axis + 1] = [None] * (parts - 1)
    return sharding.update(spec=PartitionSpec(*spec))
