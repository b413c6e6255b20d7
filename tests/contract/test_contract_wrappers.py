"""Optax's wrappers inside `sharpness_aware`, around it, and on `value_and_grad`: by hand in NumPy.

`optax.MultiSteps`, and `masked`, `partition` and `apply_if_finite` around, are in
`tests/test_numerics.py`; `inject_hyperparams` around is in `tests/test_errors.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from layer import RHO, SHARDS, layer_batch, layer_loss, layer_params, sam_gradient_by_hand
from problems import assert_trees_close, norm64

import sam_optax

BATCHES = [layer_batch(seed) for seed in range(4)]
GRADIENT = jax.jit(sam_optax.value_and_grad(layer_loss, rho=RHO, data_shards=SHARDS))
ASCENT = jax.jit(jax.grad(layer_loss))


def sam(inner):
    return sam_optax.sharpness_aware(inner, rho=RHO, data_shards=SHARDS)


def train(tx, params, batches, *, form):
    """Take a step on each batch: with `sharpness_aware` in `tx`, or with `tx` on its gradient."""
    state = tx.init(params)
    for batch in batches:
        if form == "fed":
            updates, state = tx.update(GRADIENT(params, batch)[1], state, params)
        else:
            call = {"grad_fn": jax.grad(layer_loss), "batch": batch}
            updates, state = tx.update(None, state, params, **call)
        params = optax.apply_updates(params, updates)
    return params, state


def train_by_hand(rule, batches=BATCHES):
    """Take a step on each batch, in float64, by `rule(step, g, w, memory)`."""
    params = {k: np.asarray(w, np.float64) for k, w in layer_params().items()}
    memory = {}
    for step, batch in enumerate(batches):
        params = rule(step, sam_gradient_by_hand(params, batch), params, memory)
    return params


def descend(w, g, rate=1.0):
    return {k: w[k] - rate * g[k] for k in w}


# What the wrappers do, written out.


def with_decaying_rate(step, g, w, memory):
    return descend(w, g, 1.0 - step / 4)


def with_two_rates(step, g, w, memory):
    return {"w": w["w"] - 1.0 * g["w"], "b": w["b"] - 0.1 * g["b"]}


def with_raw_bias(step, g, w, memory):
    return {"w": w["w"] - 1.0 * g["w"], "b": w["b"] + g["b"]}


def with_frozen_bias(step, g, w, memory):
    return {"w": w["w"] - 1.0 * g["w"], "b": w["b"]}


def clipped(step, g, w, memory):
    return descend(w, g, min(1, 0.02 / norm64(g)))


def clipped_by_rms_of_all(step, g, w, memory):
    return descend(w, g, min(1, 0.002 / (norm64(g) / np.sqrt(40))))


def averaged(step, g, w, memory):
    memory["mean"] = {k: 0.9 * memory.get("mean", {k: 0})[k] + 0.1 * g[k] for k in g}
    return descend(w, memory["mean"])


def every_second(step, g, w, memory):
    return descend(w, g, 1.0 if step % 2 == 0 else 0.0)


def up_every_second(step, g, w, memory):
    return descend(w, g, 1.0 if step % 2 == 0 else -1.0)


def schedule_free(step, g, y, memory):
    # Defazio et al., eq. 2 to 4: z descends, x is the mean of z, the gradient is taken between.
    z = descend(memory.get("z", y), g)
    x = {k: memory.get("x", y)[k] * (1 - 1 / (step + 1)) + z[k] / (step + 1) for k in z}
    memory.update(z=z, x=x)
    return {k: 0.9 * x[k] + 0.1 * z[k] for k in z}


def even(step):
    return step % 2 == 0


SGD = optax.sgd(1.0)
WRAPPED = {
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 4)),
        with_decaying_rate,
    ),
    "multi_transform": (
        lambda: optax.multi_transform({1: SGD, 2: optax.sgd(0.1)}, {"w": 1, "b": 2}),
        with_two_rates,
    ),
    "partition": (
        lambda: optax.partition(
            {"matrix": SGD, "vector": optax.sgd(0.1)},
            lambda params: jax.tree.map(lambda w: ["vector", "matrix"][w.ndim - 1], params),
        ),
        with_two_rates,
    ),
    "masked": (lambda: optax.masked(SGD, {"w": True, "b": False}), with_raw_bias),
    "selective_transform": (
        lambda: optax.selective_transform(SGD, freeze_mask={"w": False, "b": True}),
        with_frozen_bias,
    ),
    "chain": (lambda: optax.chain(optax.clip_by_global_norm(0.02), SGD), clipped),
    "named_chain": (
        lambda: optax.named_chain(("clip", optax.clip_by_global_norm(0.02)), ("sgd", SGD)),
        clipped,
    ),
    "flatten": (
        lambda: optax.flatten(optax.chain(optax.clip_by_block_rms(0.002), SGD)),
        clipped_by_rms_of_all,
    ),
    "ema": (lambda: optax.chain(optax.ema(0.9, debias=False), SGD), averaged),
    "conditionally_mask": (lambda: optax.conditionally_mask(SGD, even), every_second),
    "conditionally_transform": (
        lambda: optax.conditionally_transform(SGD, even),
        up_every_second,
    ),
    "schedule_free": (lambda: optax.contrib.schedule_free(SGD, 1.0), schedule_free),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["inside", "fed"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_inside_and_fed(name, form):
    make, rule = WRAPPED[name]
    tx = sam(make()) if form == "inside" else make()
    params, _ = train(tx, layer_params(), BATCHES, form=form)
    assert_trees_close(params, train_by_hand(rule), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["inside", "fed"])
def test_apply_if_finite_leaves_out_a_step(form):
    broken = BATCHES[1] | {"y": BATCHES[1]["y"].at[-1].set(jnp.nan)}  # the ascent does not see it
    tx = optax.apply_if_finite(SGD, 3)
    tx = sam(tx) if form == "inside" else tx
    params, state = train(tx, layer_params(), [BATCHES[0], broken, BATCHES[2]], form=form)
    expected = train_by_hand(lambda step, g, w, _: descend(w, g), [BATCHES[0], BATCHES[2]])
    assert_trees_close(params, expected, rtol=1e-4, atol=1e-5)
    assert state.total_notfinite == 1


# Around: what acts on the updates works, and `schedule_free`, which acts on the parameters.

AROUND = {
    "chain": (
        lambda: optax.chain(sam(optax.sgd(0.5)), optax.scale(2.0), optax.identity()),
        lambda step, g, w, memory: descend(w, g),
    ),
    "chain, behind what leaves None alone": (
        lambda: optax.chain(optax.identity(), sam(SGD)),
        lambda step, g, w, memory: descend(w, g),
    ),
    "named_chain": (
        lambda: optax.named_chain(("sam", sam(optax.identity())), ("descent", SGD)),
        lambda step, g, w, memory: descend(w, g),
    ),
    "clipped updates": (
        lambda: optax.chain(sam(SGD), optax.clip_by_global_norm(0.02)),
        clipped,
    ),
    "ema": (lambda: optax.chain(sam(SGD), optax.ema(0.9, debias=False)), averaged),
    "decay": (
        lambda: optax.chain(sam(optax.identity()), optax.add_decayed_weights(0.1), SGD),
        lambda step, g, w, memory: {k: 0.9 * w[k] - g[k] for k in w},
    ),
    "frozen": (
        lambda: optax.chain(sam(SGD), optax.freeze({"w": False, "b": True})),
        with_frozen_bias,
    ),
    "masked behind": (
        lambda: optax.chain(sam(SGD), optax.masked(optax.scale(-1.0), {"w": False, "b": True})),
        with_raw_bias,
    ),
    "schedule_free": (lambda: optax.contrib.schedule_free(sam(SGD), 1.0), schedule_free),
}


@pytest.mark.parametrize("name", AROUND)
def test_wrapper_around(name):
    make, rule = AROUND[name]
    params, _ = train(make(), layer_params(), BATCHES, form="around")
    assert_trees_close(params, train_by_hand(rule), rtol=1e-4, atol=1e-5)


def test_a_condition_around_needs_the_ascent_gradient_as_updates():
    tx, params = optax.conditionally_mask(sam(SGD), even), layer_params()
    state = tx.init(params)
    for batch in BATCHES:
        ascent = ASCENT(params, jax.tree.map(lambda x: x[::4], batch))
        call = {"grad_fn": jax.grad(layer_loss), "batch": batch}
        updates, state = tx.update(ascent, state, params, **call)
        params = optax.apply_updates(params, updates)
    assert_trees_close(params, train_by_hand(every_second), rtol=1e-4, atol=1e-5)
    for wrapper in (optax.conditionally_mask, optax.conditionally_transform):
        tx = wrapper(sam(SGD), even)  # None and updates cannot be its two branches
        with pytest.raises(ValueError, match=f"{wrapper.__name__} .* the ascent gradient as upd"):
            tx.update(None, tx.init(params), params, **call)


REFUSED = {
    "mechanize": lambda tx: optax.contrib.mechanize(tx),
    "flatten": lambda tx: optax.flatten(tx),
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "split_real_and_imaginary": lambda tx: optax.contrib.split_real_and_imaginary(tx),
    "masked": lambda tx: optax.selective_transform(tx, freeze_mask={"w": False, "b": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_around_refuses_with_the_reason(name):
    params = layer_params()
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    tx = REFUSED[name](sam(SGD))
    with pytest.raises(ValueError, match=f"optax.*{name}.*value_and_grad"):
        tx.init(params)
    # Where a state is at hand, as from a run without SAM, so does the update; a chain drops the
    # arguments that its members do not take.
    state = optax.chain(REFUSED[name](SGD)).init(params)
    call = {"grad_fn": jax.grad(layer_loss), "batch": BATCHES[0]}
    with pytest.raises(ValueError, match=f"optax.*{name}.*value_and_grad"):
        optax.chain(tx).update(params, state, params, **call)


def test_optax_sam_around_does_not_hand_on_grad_fn():
    tx, params = optax.contrib.sam(sam(SGD), SGD), layer_params()
    with pytest.raises(ValueError, match="needs grad_fn.*missing"):
        tx.update(params, tx.init(params), params, grad_fn=jax.grad(layer_loss))


# Lookahead has two copies of the parameters, and wants the gradient of one.


def lookahead_by_hand():
    slow = fast = {k: np.asarray(w, np.float64) for k, w in layer_params().items()}
    for step, batch in enumerate(BATCHES):
        fast = descend(fast, sam_gradient_by_hand(fast, batch))
        if step % 2 == 1:
            fast = slow = {k: slow[k] + 0.5 * (fast[k] - slow[k]) for k in slow}
    return optax.LookaheadParams(fast=fast, slow=slow)


def test_lookahead_fed():
    tx = optax.lookahead(SGD, sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(layer_params())
    state = tx.init(params)
    for batch in BATCHES:
        updates, state = tx.update(GRADIENT(params.fast, batch)[1], state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_close(params, lookahead_by_hand(), rtol=1e-4, atol=1e-5)


def fast_loss(params, batch):
    return layer_loss(params.fast, batch)


def test_lookahead_inside_wants_the_fast_gradient():
    lookahead = optax.lookahead(SGD, sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(layer_params())

    def one_step(inner, params, state, batch):
        call = {"grad_fn": jax.grad(fast_loss), "batch": batch}
        updates, state = sam(inner).update(None, state, params, **call)
        return optax.apply_updates(params, updates), state

    # The gradient of both copies is what lookahead alone cannot take either.
    no_tree = "structure|Expected dict"  # JAX's words, and those of 0.9
    both = jax.grad(fast_loss)(params, BATCHES[0])
    with pytest.raises(ValueError, match=no_tree):
        lookahead.update(both, lookahead.init(params), params)
    with pytest.raises(ValueError, match=no_tree):
        one_step(lookahead, params, lookahead.init(params), BATCHES[0])

    inner = optax.chain(optax.stateless(lambda grads, _: grads.fast), lookahead)
    state = inner.init(params)
    for batch in BATCHES:
        params, state = one_step(inner, params, state, batch)
    assert_trees_close(params, lookahead_by_hand(), rtol=1e-4, atol=1e-5)


def masked(tx):
    """A transformation that is named like one of Optax's, and is none of its."""

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def test_a_function_of_ones_own_may_be_named_like_a_wrapper():
    found, _ = train(masked(sam(optax.sgd(0.1))), layer_params(), BATCHES[:1], form="wrapper")
    expected, _ = train(sam(optax.sgd(0.1)), layer_params(), BATCHES[:1], form="wrapper")
    assert_trees_close(found, expected)
