"""Token-weighted mean losses where the ascent slice, or a group's part, is nothing but padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    assert_trees_close,
    mlp_batch,
    mlp_outputs,
    mlp_params,
    norm64,
)

import sam_optax

B = 64
WEIGHED = {"loss_reduction": lambda batch: jnp.sum(batch["weight"])}
# Options, the number of points, and whether each has a part of the batch to itself.
SETTINGS = {
    "sam": ({}, 1, False),
    "two steps": ({"ascent_steps": 2}, 1, False),
    "accumulated": ({"accumulation_steps": 4} | WEIGHED, 1, False),
    "ascent in two passes": ({"accumulation_steps": 8} | WEIGHED, 1, False),
    "paper": ({"m": 4}, 4, False),
    "foret": ({"m": 4, "m_sharpness": "foret"} | WEIGHED, 4, True),
    "mesh": ({"group_axes": "data"} | WEIGHED, 8, True),
}
APART = [name for name, (_, _, apart) in SETTINGS.items() if apart]


def loss_fn(params, batch):
    """Squared error by example, averaged by weight: 0 / 0 of nothing but padding, or 0."""
    errors = jnp.mean(jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]), axis=-1)
    total = jnp.sum(batch["weight"])
    return jnp.sum(errors * batch["weight"]) / jnp.maximum(total, batch["least_weight"])


PLAIN = jax.jit(jax.value_and_grad(loss_fn))
GUARDS = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])


def padded(guarded, *slices):
    """A batch whose examples have weights from 1 to 3, but 0 in `slices`."""
    weight = np.random.default_rng(0).integers(1, 4, B).astype(np.float32)
    for padding in slices:
        weight[padding] = 0
    return mlp_batch(b=B) | {"weight": weight, "least_weight": jnp.float32(guarded)}


def examples(batch, which):
    return {k: x[which] if jnp.ndim(x) else x for k, x in batch.items()}


def ascent_slices(name):
    """The examples of each group's ascent."""
    _, groups, apart = SETTINGS[name]
    start, size = (B if apart else B // 4) // groups, B // 4 // groups
    return [slice(i * start, i * start + size) for i in range(groups)]


def on_mesh(batch):
    sharded = {k: P() if k == "least_weight" else P("data") for k in batch}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return mesh, {k: jax.device_put(x, NamedSharding(mesh, sharded[k])) for k, x in batch.items()}


@functools.cache
def sam_step(name):
    """The step `(params, batch) -> (loss, grads, info)`."""
    step = jax.jit(sam_optax.value_and_grad(loss_fn, return_info=True, **SETTINGS[name][0]))
    if name != "mesh":
        return step

    def step_on_mesh(params, batch):
        mesh, batch = on_mesh(batch)
        with jax.set_mesh(mesh):
            return step(params, batch)

    return step_on_mesh


@GUARDS
@pytest.mark.parametrize("name", SETTINGS)
def test_padded_ascents_are_the_plain_step(name, guarded):
    params, batch = mlp_params(), padded(guarded, *ascent_slices(name))
    _, ascent = PLAIN(params, examples(batch, slice(1)))
    assert (norm64(ascent) == 0) == guarded, "the ascent is 0, or it is NaN"
    *result, info = sam_step(name)(params, batch)
    assert_trees_close(tuple(result), PLAIN(params, batch))
    assert info.skipped_ascents == SETTINGS[name][1] and info.realised_perturbation == 0
    batch = padded(guarded)
    *result, info = sam_step(name)(params, batch)
    assert info.skipped_ascents == 0
    assert norm64(jax.tree.map(jnp.subtract, result[1], PLAIN(params, batch)[1])) > 1e-3


def by_hand(params, batch, name, stays):
    """Loss and gradient where the points of all groups but number `stays` move."""
    _, groups, apart = SETTINGS[name]
    total, result = 0.0, jax.tree.map(jnp.zeros_like, (0.0, params))
    for i, taken in enumerate(ascent_slices(name)):
        part, w_adv, weight = batch, params, 1.0
        if apart:
            part = examples(batch, slice(i * B // groups, (i + 1) * B // groups))
            weight = float(np.sum(part["weight"]))
        if weight == 0:
            continue
        if i != stays:
            _, direction = PLAIN(params, examples(batch, taken))
            length = 0.15 / norm64(direction)
            w_adv = jax.tree.map(lambda w, g: w + length * g, params, direction)
        result = jax.tree.map(lambda r, x: r + weight * x, result, PLAIN(w_adv, part))
        total += weight
    return jax.tree.map(lambda x: x / total, result)


@GUARDS
@pytest.mark.parametrize("name", ["paper", *APART])
def test_padded_ascent_of_one_group(name, guarded):
    params, stays = mlp_params(), 1
    batch = padded(guarded, ascent_slices(name)[stays])
    *result, info = sam_step(name)(params, batch)
    assert_trees_close(tuple(result), by_hand(params, batch, name, stays))
    assert info.skipped_ascents == 1


@GUARDS
@pytest.mark.parametrize("name", APART)
def test_part_of_nothing_but_padding_adds_nothing(name, guarded):
    params, size = mlp_params(), B // SETTINGS[name][1]
    batch = padded(guarded, slice(2 * size, 3 * size))
    *result, info = sam_step(name)(params, batch)
    assert_trees_close(tuple(result), by_hand(params, batch, name, stays=2))
    assert info.skipped_ascents == 1


@GUARDS
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("accumulated", slice(16, 32)),  # the second of four parts
        ("ascent in two passes", slice(0, 8)),  # half of the ascent
    ],
)
def test_micro_batch_of_nothing_but_padding_adds_nothing(name, padding, guarded):
    params, batch = mlp_params(), padded(guarded, padding)
    *result, info = sam_step(name)(params, batch)
    assert_trees_close(tuple(result), tuple(sam_step("sam")(params, batch)[:2]))
    assert info.skipped_ascents == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_of_nothing_but_padding(name):
    params, groups = mlp_params(), SETTINGS[name][1]
    *result, info = sam_step(name)(params, padded(True, slice(None)))
    assert norm64(result) == 0 and info.skipped_ascents == groups
    *result, info = sam_step(name)(params, padded(False, slice(None)))
    if "loss_reduction" in SETTINGS[name][0]:  # where no part has any weight, nothing is added
        assert norm64(result) == 0 and info.skipped_ascents == groups
    else:  # as in the plain step
        assert all(jnp.isnan(x).all() for x in jax.tree.leaves(result))


# One point on a mesh: the ascent's examples are the first of each shard.


@functools.cache
def sharded_step(reduction_dtype):
    options = {"data_axes": "data", "reduction_dtype": reduction_dtype} | WEIGHED
    return jax.jit(sam_optax.value_and_grad(loss_fn, return_info=True, **options))


@GUARDS
@pytest.mark.parametrize("reduction_dtype", [None, jnp.float32], ids=["compiler", "float32"])
def test_padded_ascents_of_shards(guarded, reduction_dtype):
    params = mlp_params()
    shards = [slice(8 * i, 8 * i + 2) for i in range(8)]
    for slices, skipped in ((shards, 1), (shards[3:4], 0)):
        batch = padded(guarded, *slices)
        mesh, sharded = on_mesh(batch)
        with jax.set_mesh(mesh):
            *result, info = sharded_step(reduction_dtype)(params, sharded)
        expected = PLAIN(params, batch) if skipped else alone(params, batch)
        assert_trees_close(tuple(result), expected)
        assert info.skipped_ascents == skipped


alone = jax.jit(sam_optax.value_and_grad(loss_fn, data_shards=8))  # the same on one device
