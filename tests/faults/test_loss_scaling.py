"""Loss scaling in float16: an overflow skips the step, halves the scale, and that is all."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from problems import (
    assert_trees_close,
    assert_trees_equal,
    mlp_batch,
    mlp_outputs,
    mlp_params,
    norm64,
)

import sam_optax

SCALE = 2.0**12
RHO = 0.05
OPTIMIZER = optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float32)
B = 64


def half_loss(params, batch):
    """Mean squared error of a network that computes in float16, whatever its parameters are."""
    params, x, y = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch["x"], batch["y"]))
    return jnp.mean(jnp.square((mlp_outputs(params, x) - y).astype(jnp.float32)))


def all_finite(tree):
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def select(ok, new, old):
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


class LossScale(NamedTuple):
    """As `jmp.DynamicLossScale`, but that it never grows."""

    value: jax.Array

    def scale(self, loss):
        return loss * self.value

    def unscale(self, grads):
        return jax.tree.map(lambda g: g.astype(jnp.float32) / self.value, grads)

    def adjust(self, ok):
        return LossScale(jnp.where(ok, self.value, self.value / 2))


# Each step is a recipe: `(params, state, scale, batch) -> params, state, scale, info`. The last
# argument is whether to skip the step, and halve the scale, where only the ascent overflowed.


def value_and_grad_step(params, state, scale, batch, ascent_counts):
    """With value_and_grad: scale the loss, unscale the gradient, keep or drop the step."""

    def scaled_loss(params, batch):
        return scale.scale(half_loss(params, batch))

    gradient = sam_optax.value_and_grad(scaled_loss, RHO, return_info=True)
    _, grads, info = gradient(params, batch)
    grads = scale.unscale(grads)
    ok = all_finite(grads) & ((info.skipped_ascents == 0) | ~ascent_counts)
    updates, new_state = OPTIMIZER.update(grads, state, params)
    new = optax.apply_updates(params, updates), new_state
    return *select(ok, new, (params, state)), scale.adjust(ok), info


def flax_step(params, state, scale, batch, ascent_counts):
    """Flax's DynamicScale as the grad_fn of sharpness_aware, and its verdict as aux."""
    tx = sam_optax.sharpness_aware(OPTIMIZER, RHO)

    def grad_fn(params, batch):
        new_scale, finite, loss, grads = scale.value_and_grad(half_loss)(params, batch)
        return (loss, (new_scale, finite)), grads

    updates, new_state, info = tx.update(
        None, state, params, grad_fn=grad_fn, batch=batch, return_info=True
    )
    new_scale, ok = info.aux
    ok &= (info.skipped_ascents == 0) | ~ascent_counts
    halved = scale.replace(scale=scale.scale * scale.backoff_factor, fin_steps=jnp.int32(0))
    new_scale = select(ok, new_scale, halved)
    new = optax.apply_updates(params, updates), new_state
    return *select(ok, new, (params, state)), new_scale, info


def loss_scale(scale):
    return LossScale(jnp.float32(scale))


def flax_scale(scale):
    return DynamicScale(scale=jnp.float32(scale), fin_steps=jnp.int32(0))


# With the dtype of the parameters; all compute in float16.
WAYS = pytest.mark.parametrize(
    ("step", "new_scale", "dtype"),
    [
        (value_and_grad_step, loss_scale, jnp.float16),
        (value_and_grad_step, loss_scale, jnp.float32),
        (flax_step, flax_scale, jnp.float16),
    ],
    ids=["jmp style", "jmp style float32", "flax"],
)


jitted = functools.cache(jax.jit)
TAKE, SKIP = jnp.array(False), jnp.array(True)  # a step whose ascent overflowed


def number(scale):
    return float(scale.value if isinstance(scale, LossScale) else scale.scale)


def batch_with_error(error, example):
    """A batch in which one example's error is about `error`."""
    batch = mlp_batch(b=B)
    return batch | {"y": batch["y"].at[example, 0].set(error)}


# By the derivative of the mean, scaled, with respect to one output of that example:
OVERFLOWS = batch_with_error(1e4, B - 1)  # 2 * 1e4 / 192 * SCALE = 4e5 in the descent
ASCENT_OVERFLOWS = batch_with_error(450, 0)  # 8e4 in the ascent, on 48 outputs, and 2e4 later


@jax.jit
def unscaled_step(params, state, batch, rho=RHO):
    """What float16 does without a scale; its numbers here are large enough."""
    _, grads = sam_optax.value_and_grad(half_loss, rho)(params, batch)
    updates, state = OPTIMIZER.update(jax.tree.map(jnp.float32, grads), state, params)
    return optax.apply_updates(params, updates), state


def assert_same_step(params, result, expected):
    """Assert that both go the same way from `params`, but for the rounding of float16."""
    steps = [
        jax.tree.map(lambda a, w: np.float64(a) - np.float64(w), end, params)
        for end in (result, expected)
    ]
    error = norm64(jax.tree.map(np.subtract, *steps)) / norm64(steps[1])
    assert norm64(steps[1]) > 0 and error < 5e-3


@WAYS
def test_without_overflow_the_step_is_the_unscaled_one(step, new_scale, dtype):
    params, batch = mlp_params(dtype=dtype), mlp_batch(b=B)
    state = OPTIMIZER.init(params)
    for then in (TAKE, SKIP):
        moved, new_state, scale, info = jitted(step)(params, state, new_scale(SCALE), batch, then)
        expected, expected_state = unscaled_step(params, state, batch)
        assert_same_step(params, moved, expected)
        assert_trees_close(new_state, expected_state, rtol=2e-2, atol=1e-3)
        assert number(scale) == SCALE and info.skipped_ascents == 0
    plain, _ = unscaled_step(params, state, batch, rho=0.0)
    with pytest.raises(AssertionError):  # the step is not the plain one
        assert_same_step(params, moved, plain)


@WAYS
def test_overflow_in_the_descent_skips_the_step_and_halves_the_scale(step, new_scale, dtype):
    params = mlp_params(dtype=dtype)
    before = jitted(step)(params, OPTIMIZER.init(params), new_scale(SCALE), mlp_batch(b=B), TAKE)[
        :3
    ]
    for then in (TAKE, SKIP):
        params, state, scale, info = jitted(step)(*before, OVERFLOWS, then)
        assert_trees_equal((params, state), before[:2])
        assert number(scale) == SCALE / 2 and info.skipped_ascents == 0
    # The next step is the one from before, at the lower scale.
    following = mlp_batch(1, b=B), TAKE
    moved, *_ = jitted(step)(params, state, scale, *following)
    expected, *_ = jitted(step)(*before[:2], new_scale(SCALE / 2), *following)
    assert_trees_equal(moved, expected)


@WAYS
def test_overflow_in_the_ascent_is_the_plain_step_or_skips_it_as_wanted(step, new_scale, dtype):
    params = mlp_params(dtype=dtype)
    before = (params, OPTIMIZER.init(params))
    *after, scale, info = jitted(step)(*before, new_scale(SCALE), ASCENT_OVERFLOWS, TAKE)
    assert info.skipped_ascents == 1 and number(scale) == SCALE
    assert_same_step(params, after[0], unscaled_step(*before, ASCENT_OVERFLOWS, rho=0.0)[0])
    *after, scale, info = jitted(step)(*before, new_scale(SCALE), ASCENT_OVERFLOWS, SKIP)
    assert info.skipped_ascents == 1 and number(scale) == SCALE / 2
    assert_trees_equal(tuple(after), before)


@WAYS
def test_scale_comes_down_until_the_step_is_the_unscaled_one(step, new_scale, dtype):
    params = mlp_params(dtype=dtype)
    state, scale, tries = OPTIMIZER.init(params), new_scale(2.0**24), 0
    moved = params
    while moved is params or norm64(jax.tree.map(jnp.subtract, moved, params)) == 0:
        moved, state, scale, _ = jitted(step)(params, state, scale, OVERFLOWS, SKIP)
        tries += 1
        assert tries < 24
    assert tries > 2 and number(scale) == 2.0 ** (24 - tries + 1)
    assert_same_step(params, moved, unscaled_step(params, OPTIMIZER.init(params), OVERFLOWS)[0])


def test_ascent_on_padding_has_a_finite_norm_where_an_overflow_has_not():
    def weighted_loss(params, batch):
        return jnp.sum(half_loss(params, {k: batch[k] for k in "xy"}) * batch["weight"][0])

    gradient = sam_optax.value_and_grad(weighted_loss, RHO, return_info=True)
    for weight, norm_is_finite in ((0.0, True), (np.inf, False)):
        batch = mlp_batch(b=B) | {"weight": jnp.full(B, weight)}
        *_, info = gradient(mlp_params(), batch)
        assert info.skipped_ascents == 1
        assert jnp.isfinite(info.ascent_grad_norm) == norm_is_finite


def test_static_scale_with_apply_if_finite():
    optimizer = optax.apply_if_finite(OPTIMIZER, max_consecutive_errors=5)

    @jax.jit
    def train_step(params, state, batch):
        def scaled_loss(params, batch):
            return SCALE * half_loss(params, batch)

        _, grads = sam_optax.value_and_grad(scaled_loss, RHO)(params, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / SCALE, grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = mlp_params(dtype=jnp.float16)
    state = optimizer.init(params)
    moved, _ = train_step(params, state, mlp_batch(b=B))
    assert_same_step(params, moved, unscaled_step(params, state.inner_state, mlp_batch(b=B))[0])
    skipped, after = train_step(params, state, OVERFLOWS)
    assert_trees_equal((skipped, after.inner_state), (params, state.inner_state))
    assert after.total_notfinite == 1


def test_unscaled_gradient_keeps_its_dtype():
    """Too small for float16, which is why there is a scale, it is not rounded to it again."""

    def tiny_loss(params, batch):
        return 1e-7 * half_loss(params, batch)

    def grad_fn(params, batch):
        _, _, loss, grads = DynamicScale(scale=jnp.float32(2.0**20)).value_and_grad(tiny_loss)(
            params, batch
        )
        return loss, grads

    params, batch = mlp_params(dtype=jnp.float16), mlp_batch(b=B)
    identity = optax.GradientTransformation(lambda params: (), lambda g, state, _: (g, state))
    tx = sam_optax.sharpness_aware(identity, RHO)
    grads, _ = tx.update(None, (), params, grad_fn=grad_fn, batch=batch)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    expected = sam_optax.value_and_grad(half_loss, RHO)(params, batch)[1]
    assert_trees_close(jax.tree.map(lambda g: g * 1e7, grads), expected, rtol=2e-2, atol=1e-3)
