"""NaN and inf in loss, gradient or one example: the ascent falls back to w, the descent decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    assert_trees_close,
    assert_trees_equal,
    mlp_batch,
    mlp_loss,
    mlp_params,
    norm64,
)

import sam_optax

RHO, B = 0.15, 64
BAD = [np.nan, np.inf, -np.inf]
# What is not finite; with "constant", the loss is not and its gradient is.
KINDS = ["loss", "gradient", "example", "constant"]
# Options, the number of points, and the examples of one ascent pass.
SETTINGS = {
    "sam": ({}, 1, 16),
    "two steps": ({"ascent_steps": 2}, 1, 16),
    "asam": ({"perturbation": sam_optax.adaptive_perturbation()}, 1, 16),
    "accumulated": ({"accumulation_steps": 2}, 1, 16),
    "paper": ({"m": 4}, 4, 4),
    "foret": ({"m": 4, "m_sharpness": "foret"}, 4, 4),
    "mesh": ({"group_axes": "data"}, 8, 2),
}
WITH_GROUPS = ["paper", "foret", "mesh"]
BIT_FOR_BIT = ["sam", "two steps", "asam"]  # the others add up parts of the batch


@jax.custom_vjp
def spoil_gradient(x, bad):
    """Return `x`; its derivative is `1 + bad`."""
    return x


spoil_gradient.defvjp(lambda x, bad: (x, bad), lambda bad, g: (g * (1 + bad), jnp.zeros_like(bad)))


def faulty_loss(ascent_examples, params, batch):
    """Mean squared error with the faults that `batch` plans for this pass, known by its size."""
    fault = batch["ascent" if len(batch["x"]) == ascent_examples else "descent"]
    loss = mlp_loss(params, {"x": batch["x"] + fault["example"][:, None], "y": batch["y"]})
    loss = spoil_gradient(loss * (1 + jnp.sum(fault["loss"])), jnp.sum(fault["gradient"]))
    return loss + jnp.sum(fault["constant"])


def planned(*faults, seed=0):
    """A batch with faults `(pass, kind, examples, value)`."""
    plan = {of: {kind: np.zeros(B, np.float32) for kind in KINDS} for of in ("ascent", "descent")}
    for of, kind, examples, value in faults:
        plan[of][kind][examples] = value
    return mlp_batch(seed, b=B) | plan


def first_of_each_group(name):
    """The first example of every group's ascent micro-batch."""
    _, groups, ascent_examples = SETTINGS[name]
    apart = ascent_examples if name == "paper" else B // groups
    return [i * apart for i in range(groups)]


def faults_everywhere(name, of, kind, value):
    return planned((of, kind, first_of_each_group(name), value))


def on_mesh(name, step, **options):
    """`step(*args, batch)`, with the batch sharded where the setting wants it so."""
    step = jax.jit(step, compiler_options=options)
    if name != "mesh":
        return step
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step_on_mesh(*args):
        with jax.set_mesh(mesh):
            batch = jax.device_put(args[-1], NamedSharding(mesh, P("data")))
            return step(*jax.device_put(args[:-1], NamedSharding(mesh, P())), batch)

    return step_on_mesh


def by_value_and_grad(loss_fn, **options):
    return sam_optax.value_and_grad(loss_fn, RHO, return_info=True, **options)


def by_sharpness_aware(loss_fn, **options):
    tx = sam_optax.sharpness_aware(optax.sgd(1.0), RHO, **options)

    def gradient(params, batch):
        grad_fn = jax.value_and_grad(loss_fn)
        updates, _, info = tx.update(
            None, tx.init(params), params, grad_fn=grad_fn, batch=batch, return_info=True
        )
        return info.descent_loss, jax.tree.map(jnp.negative, updates), info

    return gradient


PLAIN = jax.jit(jax.value_and_grad(functools.partial(faulty_loss, None)))


@functools.cache
def steps(entry, name):
    """The step `(params, batch) -> (loss, grads, info)`, and the plain one."""
    options, _, ascent_examples = SETTINGS[name]
    loss_fn = functools.partial(faulty_loss, ascent_examples)
    return on_mesh(name, entry(loss_fn, **options)), PLAIN


ENTRIES = pytest.mark.parametrize("entry", [by_value_and_grad, by_sharpness_aware])


def not_finite(tree):
    """Where the numbers of a tree are not finite."""
    return jax.tree.map(lambda x: ~np.isfinite(np.asarray(x)), tree)


@pytest.mark.one_in(3)
@ENTRIES
@pytest.mark.parametrize("name", SETTINGS)
def test_fault_in_every_ascent_is_the_plain_step(entry, name):
    (step, plain), params = steps(entry, name), mlp_params()
    expected = plain(params, planned())
    for kind in ("loss", "gradient", "example"):
        for bad in BAD:
            *result, info = step(params, faults_everywhere(name, "ascent", kind, bad))
            assert info.skipped_ascents == SETTINGS[name][1], kind
            assert info.realised_perturbation == 0
            same = assert_trees_equal if name in BIT_FOR_BIT else assert_trees_close
            same(tuple(result), expected)
    # Without the fault it is not the plain step: the comparison above is worth something.
    *result, info = step(params, planned())
    assert info.skipped_ascents == 0
    assert norm64(jax.tree.map(jnp.subtract, result[1], expected[1])) > 1e-3


@functools.cache
def by_hand(name, stays):
    """Loss and gradient where the points of all groups but number `stays` move."""
    params, batch, groups = mlp_params(), mlp_batch(b=B), SETTINGS[name][1]
    form = "paper" if name == "paper" else "foret"
    micro_batches, parts = sam_optax.ascent_groups(batch, m=groups, m_sharpness=form)
    plain, results = jax.jit(jax.value_and_grad(mlp_loss)), []
    for i in range(groups):
        micro_batch, part = jax.tree.map(lambda x: x[i], (micro_batches, parts))
        _, direction = plain(params, micro_batch)
        length = 0.0 if i == stays else RHO / norm64(direction)
        w_adv = jax.tree.map(lambda w, g: w + length * g, params, direction)
        results.append(plain(w_adv, batch if parts is None else part))
    return jax.tree.map(lambda *x: sum(x) / groups, *results)


@ENTRIES
@pytest.mark.parametrize("name", WITH_GROUPS)
def test_fault_in_one_ascent_leaves_the_other_groups_theirs(entry, name):
    (step, _), params = steps(entry, name), mlp_params()
    groups = SETTINGS[name][1]
    stays = groups - 2
    expected = by_hand(name, stays)
    for kind, bad in zip(("loss", "gradient", "example"), BAD, strict=True):
        fault = ("ascent", kind, first_of_each_group(name)[stays], bad)
        *result, info = step(params, planned(fault))
        assert_trees_close(tuple(result), expected)
        assert info.skipped_ascents == 1
        np.testing.assert_allclose(info.realised_perturbation, 1 - 1 / groups, rtol=1e-5)


@ENTRIES
@pytest.mark.parametrize("name", SETTINGS)
def test_fault_in_the_descent_decides_as_in_the_plain_step(entry, name):
    (step, plain), params = steps(entry, name), mlp_params()
    for kind in ("loss", "gradient", "example"):
        for bad in BAD:
            batch = planned(("descent", kind, B - 1, bad))
            *result, info = step(params, batch)
            expected = not_finite(plain(params, batch))
            assert any(x.any() for x in jax.tree.leaves(expected[1]))
            assert_trees_equal(not_finite(tuple(result)), expected)
            assert info.skipped_ascents == 0


@ENTRIES
@pytest.mark.parametrize("name", SETTINGS)
def test_fault_in_both_passes_decides_as_in_the_plain_step(entry, name):
    (step, plain), params = steps(entry, name), mlp_params()
    for kind in ("loss", "gradient", "example"):
        for bad in BAD:
            examples = first_of_each_group(name)
            batch = planned(*((of, kind, examples, bad) for of in ("ascent", "descent")))
            *result, info = step(params, batch)
            expected = plain(params, batch)
            assert_trees_equal(not_finite(tuple(result)), not_finite(expected))
            assert info.skipped_ascents == SETTINGS[name][1]
            if name in BIT_FOR_BIT:
                jax.tree.map(np.testing.assert_array_equal, tuple(result), expected)


@ENTRIES
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_that_is_not_finite_where_its_gradient_is(entry, name):
    (step, _), params = steps(entry, name), mlp_params()
    clean = step(params, planned())
    for bad in BAD:
        loss, grads, info = step(params, faults_everywhere(name, "ascent", "constant", bad))
        assert_trees_equal((loss, grads), clean[:2])
        assert info.skipped_ascents == 0 and not jnp.isfinite(info.ascent_loss)
        loss, grads, _ = step(params, faults_everywhere(name, "descent", "constant", bad))
        assert_trees_equal(grads, clean[1])
        assert not jnp.isfinite(loss)


@pytest.mark.parametrize("bad", BAD)
def test_second_ascent_step_without_direction_is_not_taken(bad):
    params, batch = mlp_params(), mlp_batch(b=B)

    def ascent_loss(p, batch):  # spoiled everywhere but at w
        at_w = jnp.all(p["hidden"]["bias"] == params["hidden"]["bias"])
        return spoil_gradient(mlp_loss(p, batch), jnp.where(at_w, 0.0, bad))

    gradient = sam_optax.value_and_grad(
        mlp_loss, RHO, ascent_steps=2, ascent_loss_fn=ascent_loss, return_info=True
    )
    *result, info = gradient(params, batch)
    assert_trees_close(tuple(result), sam_optax.value_and_grad(mlp_loss, RHO / 2)(params, batch))
    np.testing.assert_allclose(info.realised_perturbation, 0.5, rtol=1e-5)


# apply_if_finite skips the step with the fault, and nothing else.

WRAPPED = optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=5)


def train_with_value_and_grad(loss_fn, **options):
    def train_step(params, state, batch):
        _, grads = sam_optax.value_and_grad(loss_fn, RHO, **options)(params, batch)
        updates, state = WRAPPED.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return train_step


def train_with_sharpness_aware(loss_fn, **options):
    tx = sam_optax.sharpness_aware(WRAPPED, RHO, **options)

    def train_step(params, state, batch):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(loss_fn), batch=batch)
        return optax.apply_updates(params, updates), state

    return train_step


@functools.cache
def train_step(entry, name):
    options, _, ascent_examples = SETTINGS[name]
    step = entry(functools.partial(faulty_loss, ascent_examples), **options)
    return on_mesh(name, step, xla_backend_optimization_level=0)  # compiles sooner


WRAPPED_IN = pytest.mark.parametrize(
    ("entry", "name"),
    [
        *((train_with_value_and_grad, name) for name in SETTINGS),
        (train_with_sharpness_aware, "sam"),
    ],
)


@WRAPPED_IN
def test_apply_if_finite_skips_the_step_and_nothing_else(entry, name):
    step, params = train_step(entry, name), mlp_params()
    before = step(params, WRAPPED.init(params), planned())
    next_without_fault = step(*before, planned(seed=1))
    for kind, bad in zip(("loss", "gradient", "example"), BAD, strict=True):
        params, state = step(*before, planned(("descent", kind, B - 1, bad), seed=2))
        assert_trees_equal((params, state.inner_state), (before[0], before[1].inner_state))
        assert not state.last_finite and state.total_notfinite == 1
        params, state = step(params, state, planned(seed=1))
        assert_trees_equal(params, next_without_fault[0])
        assert_trees_equal(state.inner_state, next_without_fault[1].inner_state)
        assert state.last_finite and state.notfinite_count == 0


@WRAPPED_IN
def test_apply_if_finite_takes_the_plain_step_where_only_the_ascent_is_at_fault(entry, name):
    step, params = train_step(entry, name), mlp_params()
    state = WRAPPED.init(params)
    updates, _ = WRAPPED.update(PLAIN(params, planned())[1], state, params)
    expected = optax.apply_updates(params, updates)
    moved, state = step(params, state, faults_everywhere(name, "ascent", "gradient", np.nan))
    assert_trees_close(moved, expected, rtol=1e-4)
    assert state.last_finite and state.total_notfinite == 0
