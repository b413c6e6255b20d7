"""The ways that benchmarks/step_cost.py compares are what their names say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ways


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["in"]) @ params["out"] - 1) ** 2)


PARAMS = {
    "in": jax.random.normal(jax.random.key(0), (3, 8)),
    "out": jax.random.normal(jax.random.key(1), (8,)),
}
BATCH = jax.random.normal(jax.random.key(2), (32, 3))
# Not Adafactor, whose first step hardly depends on the gradient's size.
WAYS = ways.ways(loss_fn, optax.sgd(0.1))


def after_a_step(name):
    way = WAYS[name]
    params, state = PARAMS, way.init(PARAMS)
    for _ in range(way.calls):
        params, state, loss = jax.jit(way.step)(params, state, BATCH)
    return params, loss


@pytest.fixture(scope="module")
def by_hand():
    return after_a_step("by hand, as Foret et al.")


@pytest.mark.parametrize("name", ["optax.contrib.sam, opaque", "a/b = 1"])
def test_sam_of_the_whole_batch_is_one_thing(name, by_hand):
    chex.assert_trees_all_close(after_a_step(name)[0], by_hand[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "GSAM", "a/b = 1/4", "m = 4, paper", "m = 4, Foret"])
def test_others_are_other_steps(name, by_hand):
    differ = jax.tree.map(
        lambda x, y: not np.allclose(x, y, rtol=1e-5), after_a_step(name)[0], by_hand[0]
    )
    assert any(jax.tree.leaves(differ))


def test_transparent_mode_moves_once_in_two_calls():
    way = WAYS["optax.contrib.sam, transparent"]
    ascended, state, _ = way.step(PARAMS, way.init(PARAMS), BATCH)
    moved = jax.tree.map(jnp.subtract, ascended, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(moved), ways.RHO, rtol=1e-5)
    chex.assert_trees_all_close(
        after_a_step("optax.contrib.sam, transparent")[0], way.step(ascended, state, BATCH)[0]
    )


def test_gsam_lessens_what_is_orthogonal():
    first, _, sam = ways._at_adversarial_point(loss_fn, PARAMS, BATCH)
    _, gsam = ways._gsam(loss_fn)(PARAMS, BATCH)
    removed = jax.tree.map(lambda s, g: (s - g) / ways.GSAM_ALPHA, sam, gsam)
    dot = optax.tree.vdot
    np.testing.assert_allclose(dot(removed, sam), 0, atol=1e-4)
    along = dot(first, sam) / dot(sam, sam)
    chex.assert_trees_all_close(
        removed, jax.tree.map(lambda f, s: f - along * s, first, sam), atol=1e-4
    )
