"""What holds of every gradient, batch, mask and mesh, on examples that Hypothesis chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    assert_trees_close,
    assert_trees_equal,
    mlp_batch,
    mlp_loss,
    mlp_outputs,
    mlp_params,
    norm64,
)

import sam_optax

# The same examples in every run; a smaller seed would say no more. Steps compile once, outside.
reproducible = settings(
    derandomize=True, deadline=None, max_examples=15, phases=[Phase.explicit, Phase.generate]
)

SEEDS = st.integers(0, 2**32 - 1)
RHOS = st.floats(0.01, 2.0)


def with_w_adv(loss_fn):
    """A loss function that hands out its parameters, which are w_adv, as aux."""
    return lambda params, batch: (loss_fn(params, batch), params)


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)


# ||eps|| = rho, whatever the size of the gradient.


@functools.cache
def step_along(dtype):
    """The perturbation and w_adv where the gradient is `direction`."""

    def loss_fn(params, direction):
        products = jax.tree.map(lambda w, c: jnp.sum(w * c[0]), params, direction)
        return sum(jax.tree.leaves(products))

    def step(params, direction, rho):
        gradient = sam_optax.value_and_grad(with_w_adv(loss_fn), rho, 1.0, has_aux=True)
        (_, w_adv), _ = gradient(params, jax.tree.map(lambda c: c[None], direction))
        return sam_optax.gradient_perturbation(direction, params, rho), w_adv

    return jax.jit(step), mlp_params(dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (jnp.float32, st.floats(-36, 36)),
        (jnp.bfloat16, st.floats(-36, 36)),
        (jnp.float16, st.floats(-5, 3.5)),
    ],
)
@settings(reproducible, max_examples=40)
@given(data=st.data(), seed=SEEDS, rho=RHOS)
def test_the_perturbation_has_length_rho(dtype, exponents, data, seed, rho):
    step, params = step_along(dtype)
    scale = 10.0 ** data.draw(exponents)
    direction = jax.tree.map(
        lambda w: jnp.asarray(np.asarray(w, np.float64) * scale, dtype), mlp_params(seed)
    )
    epsilon, w_adv = step(params, direction, rho)
    assert {x.dtype for x in jax.tree.leaves((epsilon, w_adv))} == {np.dtype("float32")}
    np.testing.assert_allclose(norm64(epsilon), rho, rtol=1e-5)
    np.testing.assert_allclose(norm64(difference(w_adv, params)), rho, rtol=1e-4)


# The order of the examples does not matter, only which of them ascend.

SAM = jax.jit(lambda params, batch, rho: sam_optax.value_and_grad(mlp_loss, rho)(params, batch))


@reproducible
@given(seed=SEEDS, ascent=st.permutations(range(4)), rest=st.permutations(range(4, 16)), rho=RHOS)
def test_the_order_of_examples_does_not_matter(seed, ascent, rest, rho):
    params, batch = mlp_params(seed), mlp_batch(seed)
    order = np.array(ascent + rest)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    expected = SAM(params, batch, rho)
    assert_trees_close(SAM(params, shuffled, rho), expected, rtol=1e-4, atol=1e-5)
    others_ascend = jax.tree.map(lambda x: jnp.roll(x, 4, axis=0), batch)
    moved = difference(SAM(params, others_ascend, rho)[1], expected[1])
    assert norm64(moved) > 1e-4, "which examples ascend does not matter: this test shows nothing"


# A sharded step is the step on one device.


@functools.cache
def sharded(kind, name):
    """The step on a mesh of eight data shards, and where it wants its arguments."""
    options = {
        "sam": {},
        "groups": {"group_axes": "data"},
        "accumulated": {"accumulation_steps": 2},
    }
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    axes = {"data_axes": "data"} if kind == "auto" else {}
    return mesh, jax.jit(sam_optax.value_and_grad(mlp_loss, **axes, **options[name]))


@functools.cache
def unsharded(name):
    options = {"groups": {"m": 8, "m_sharpness": "foret"}}.get(name, {"data_shards": 8})
    return jax.jit(sam_optax.value_and_grad(mlp_loss, **options))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["sam", "groups", "accumulated"])
@settings(reproducible, max_examples=10)
@given(seed=SEEDS, size=st.floats(0.1, 10))
def test_a_sharded_step_is_the_step_on_one_device(name, kind, seed, size):
    params, batch = mlp_params(seed), mlp_batch(seed, b=64)
    batch["y"] = size * batch["y"]
    mesh, step = sharded(kind, name)

    def put(tree, spec):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)

    with jax.set_mesh(mesh):
        result = step(put(params, P()), put(batch, P("data")))
    assert_trees_close(result, unsharded(name)(params, batch), rtol=1e-4, atol=1e-4)


# Gradients of micro-batches add up to the whole batch's, padding or not.


def token_sum(params, batch):
    error = jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum(-1)
    return jnp.sum(error * batch["weight"])


LOSSES = {
    "mean": (lambda params, batch: token_sum(params, batch) / len(batch["x"]), "mean"),
    "sum": (token_sum, "sum"),
    "tokens": (
        lambda params, batch: token_sum(params, batch) / batch["weight"].sum(),
        lambda batch: batch["weight"].sum(),
    ),
}


@functools.cache
def in_passes(name, passes):
    loss_fn, reduction = LOSSES[name]
    options = {"accumulation_steps": passes, "loss_reduction": reduction}
    return jax.jit(sam_optax.value_and_grad(loss_fn, 0.15, 0.5, **options))


@pytest.mark.parametrize("name", LOSSES)
@reproducible
@given(seed=SEEDS, weights=st.lists(st.integers(0, 3), min_size=16, max_size=16).filter(any))
def test_accumulated_is_whole(name, seed, weights):
    params = mlp_params(seed)
    batch = mlp_batch(seed) | {"weight": jnp.asarray(weights, jnp.float32)}
    whole = in_passes(name, 1)(params, batch)
    assert_trees_close(in_passes(name, 4)(params, batch), whole, rtol=1e-4, atol=1e-5)


# A mask leaves the parameters that it does not choose where they are.


@functools.cache
def masked(mask):
    bias, kernel, out = mask
    perturb = {"hidden": {"bias": bias, "kernel": kernel}, "out": {"kernel": out}}
    gradient = sam_optax.value_and_grad(with_w_adv(mlp_loss), has_aux=True, perturb=perturb)
    return jax.jit(gradient), perturb


@reproducible
@given(seed=SEEDS, mask=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any))
def test_masked_leaves_stay_where_they_are(seed, mask):
    params, batch = mlp_params(seed), mlp_batch(seed)
    step, perturb = masked(mask)
    (_, w_adv), grads = step(params, batch)

    def check(chosen, v, w):
        assert bool((v != w).any()) == chosen
        if not chosen:
            assert_trees_equal(v, w)

    jax.tree.map(check, perturb, w_adv, params)
    np.testing.assert_allclose(norm64(difference(w_adv, params)), 0.15, rtol=1e-4)
    assert_trees_close(grads, PLAIN(w_adv, batch)[1])


PLAIN = jax.jit(jax.value_and_grad(mlp_loss))


# m groups: the mean of m SAM gradients, written out.


def part(batch, start, size):
    return jax.tree.map(lambda x: x[start : start + size], batch)


def mean_by_hand(params, batch, rho, m, m_sharpness):
    """The mean of loss and gradient at m points, with a quarter of 32 examples for the ascent."""
    results = []
    for i in range(m):
        own = batch if m_sharpness == "paper" else part(batch, i * 32 // m, 32 // m)
        start = 8 * i // m if m_sharpness == "paper" else 0
        g = jax.grad(mlp_loss)(params, part(own, start, 8 // m))
        length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
        point = jax.tree.map(lambda w, g, n=length: w + rho * g / n, params, g)
        results.append(jax.value_and_grad(mlp_loss)(point, own))
    return jax.tree.map(lambda *x: sum(x) / m, *results)


@functools.cache
def grouped(m, m_sharpness):
    def ours(params, batch, rho):
        gradient = sam_optax.value_and_grad(mlp_loss, rho, m=m, m_sharpness=m_sharpness)
        return gradient(params, batch)

    return jax.jit(ours), jax.jit(functools.partial(mean_by_hand, m=m, m_sharpness=m_sharpness))


@pytest.mark.parametrize("m_sharpness", ["paper", "foret"])
@pytest.mark.parametrize("m", [2, 4])
@reproducible
@given(seed=SEEDS, rho=RHOS)
def test_m_groups_average(m, m_sharpness, seed, rho):
    params, batch = mlp_params(seed), mlp_batch(seed, b=32)
    ours, by_hand = grouped(m, m_sharpness)
    expected = by_hand(params, batch, rho)
    assert_trees_close(ours(params, batch, rho), expected, rtol=1e-4, atol=1e-5)


# ASAM without eta does not see how two layers share a scale between them.


def two_layers(params, x):
    return jnp.mean(jnp.square(jax.nn.relu(x @ params["a"]) @ params["b"] - 1))


@functools.cache
def adversarial_step(perturbation):
    return jax.jit(sam_optax.value_and_grad(two_layers, rho=0.3, perturbation=perturbation))


ASAM = sam_optax.adaptive_perturbation(eta=0.0)


@reproducible
@given(seed=SEEDS, exponents=st.lists(st.floats(-3, 3), min_size=7, max_size=7))
def test_asam_is_invariant_to_rescaling(seed, exponents):
    rng = np.random.default_rng(seed)
    a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 7), (7, 3), (16, 5)])
    factor = 10.0 ** jnp.asarray(exponents, jnp.float32)  # one for each hidden unit
    rescaled = {"a": a * factor[None], "b": b / factor[:, None]}
    loss, grads = adversarial_step(ASAM)({"a": a, "b": b}, x)
    other_loss, other_grads = adversarial_step(ASAM)(rescaled, x)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-4)
    back = {"a": other_grads["a"] * factor[None], "b": other_grads["b"] / factor[:, None]}
    assert_trees_close(back, grads, rtol=1e-3, atol=1e-4)


def test_sam_is_not_invariant_to_rescaling():
    params, x = {"a": jnp.ones((5, 7)), "b": jnp.ones((7, 3))}, jnp.ones((16, 5))
    rescaled = {"a": 10 * params["a"], "b": params["b"] / 10}
    losses = (adversarial_step(None)(p, x)[0] for p in (params, rescaled))
    assert abs(next(losses) / next(losses) - 1) > 0.01


# rho = 0 is the plain gradient, bit for bit.


@functools.cache
def standing_still(name):
    options = {
        "sam": {"rho": 0},
        "minus zero": {"rho": -0.0},
        "array": {"rho": jnp.float32(0)},
        "groups": {"rho": 0.0, "m": 4},
        "parts": {"rho": 0.0, "m": 2, "m_sharpness": "foret"},
        "asam": {"rho": 0.0, "perturbation": ASAM, "ascent_steps": 2},
    }
    return jax.jit(sam_optax.value_and_grad(mlp_loss, **options[name]))


@reproducible
@given(
    name=st.sampled_from(["sam", "minus zero", "array", "groups", "parts", "asam"]),
    seed=SEEDS,
    size=st.floats(1e-3, 1e3),
)
def test_rho_zero_is_the_plain_gradient(name, seed, size):
    params, batch = mlp_params(seed), mlp_batch(seed)
    batch["y"] = size * batch["y"]
    assert_trees_equal(standing_still(name)(params, batch), PLAIN(params, batch))
