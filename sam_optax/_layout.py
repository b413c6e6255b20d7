"""How the batch is laid out over a mesh: how many data shards, and over which axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from ._types import PyTree

Axes = str | Sequence[str]


class Layout(NamedTuple):
    """The mesh axes that the batch axis is sharded over.

    Attributes:
      axes: names of the axes, major first; empty where they are not known by name.
      mesh: the mesh, or `None`.
      shards: number of data shards, the product of the axes' sizes.
    """

    axes: tuple[str, ...]
    mesh: Any
    shards: int

    @classmethod
    def over(cls, axes: tuple[str, ...], mesh: Any) -> "Layout":
        """Return the layout over `axes`, but for those that are manual here."""
        axes = tuple(axis for axis in axes if axis not in manual_axes())
        return cls(axes, mesh, math.prod(mesh.shape[axis] for axis in axes))

    def within(self, groups: tuple[str, ...]) -> "Layout":
        """Return the layout of one group's part, where each shard of `groups` is a group."""
        axes = tuple(axis for axis in self.axes if axis not in groups)
        return Layout(axes, self.mesh, math.prod(self.mesh.shape[axis] for axis in axes))


def batch_layout(
    batch: PyTree,
    *,
    batch_axis: int,
    data_axes: Axes | None,
    mesh: Mesh | None,
    data_shards: int | None,
) -> Layout:
    """Return the layout that is named, or else the one in the types of an explicit mesh.

    Axes that are manual here, inside `jax.shard_map`, do not count: there the batch is the one of
    this shard alone.

    Raises:
      ValueError: if `data_axes` are not axes of the mesh, there is no mesh, or the types of the
        batch's leaves disagree, with one another or with `data_shards`.
    """
    if data_axes is None:
        axes = _axes_in_types(batch, batch_axis)
        if not axes:
            return Layout((), mesh, int(data_shards or 1))
        layout = Layout.over(axes, jax.sharding.get_abstract_mesh())
        if data_shards is not None and data_shards != layout.shards:
            raise ValueError(
                f"data_shards={data_shards!r}, but the batch is sharded over {axes}, which have "
                f"{layout.shards} shards. On a mesh with explicit axes leave data_shards out."
            )
        return layout
    axes = as_names(data_axes)
    return Layout.over(axes, find_mesh(mesh, axes, "data_axes"))


def find_mesh(mesh: Mesh | None, axes: tuple[str, ...], name: str) -> Any:
    """Return `mesh`, or the one of `jax.set_mesh`, after checking that it has `axes`."""
    found: Any = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if found.empty:
        raise ValueError(
            f"{name}={axes!r} are axes of a mesh, but there is none here. Call the step under "
            "jax.set_mesh(mesh), or give mesh=."
        )
    missing = [axis for axis in axes if axis not in found.shape]
    if missing:
        raise ValueError(f"{name}={axes!r}: the mesh has no {missing}, only {dict(found.shape)}.")
    return found


def as_names(axes: Axes) -> tuple[str, ...]:
    """Return one axis name or several as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes)


def names_in(entry: Any) -> tuple[str, ...]:
    """Return the axes that an entry of a `PartitionSpec` names: none, one or several."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def manual_axes() -> tuple[str, ...]:
    """Return the axes of the `jax.shard_map` that this is called in, if any."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _axes_in_types(batch: PyTree, batch_axis: int) -> tuple[str, ...]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(leaf, jax.Array) or leaf.ndim == 0:
            continue
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            continue
        if not -leaf.ndim <= batch_axis < leaf.ndim:
            continue  # `examples` says what is wrong
        found["batch" + jax.tree_util.keystr(path)] = names_in(sharding.spec[batch_axis])
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{path}: {axes or 'no axis'}" for path, axes in found.items())
        raise ValueError(
            f"The batch's arrays are sharded over different mesh axes along batch_axis="
            f"{batch_axis}: {listed}. Shard them alike, so that each shard holds whole examples."
        )
    return next(iter(found.values()), ())
