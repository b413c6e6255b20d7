"""What the compiler makes of the step: exact, so it can fail a build."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import cost

import sam_optax

WIDTH, LAYERS, BATCH = 256, 4, 512


def loss_fn(params, batch):
    x = batch
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(jnp.square(x - 1))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 16, jnp.float32) for _ in range(LAYERS)]
    return params, jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)


def step_cost(problem, gradient):
    params, batch = problem
    tx = optax.sgd(0.1)

    def step(params, state, batch):
        loss, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return cost(step, params, tx.init(params), batch)[0]


@pytest.fixture(scope="module")
def plain(problem):
    return step_cost(problem, jax.value_and_grad(loss_fn))


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({"ascent_fraction": 1.0}, 2.0),
        ({}, 1.25),
        ({"ascent_fraction": 0.125}, 1.125),
        ({"m": 4}, 4.25),
        ({"m": 4, "m_sharpness": "foret"}, 1.25),
        ({"ascent_steps": 2}, 1.5),
        ({"rho": 0.0}, 1.0),
    ],
)
def test_flops(problem, plain, options, ratio):
    sam = step_cost(problem, sam_optax.value_and_grad(loss_fn, **options))
    # The norm and the perturbation are about 10 operations a weight, for each group.
    np.testing.assert_allclose(sam.flops / plain.flops, ratio, rtol=0.02)
    if ratio == 1.0:
        assert sam.flops == plain.flops


def test_temporaries_are_at_most_one_copy_of_the_parameters_more(problem, plain):
    sam = step_cost(problem, sam_optax.value_and_grad(loss_fn))
    copy = sum(w.nbytes for w in problem[0])
    assert sam.temporary_bytes <= plain.temporary_bytes + 1.01 * copy


def test_the_scale_of_the_gradient_is_decided_once():
    def program(leaves):
        tree = [jnp.ones((3 + i, 5)) for i in range(leaves)]
        return jax.jit(lambda g: sam_optax.gradient_perturbation(g, None, 0.1)).lower(tree)

    few, many = (program(n).compile().as_text().count(" is-finite(") for n in (2, 20))
    assert 0 < few == many, "XLA decides it anew in every leaf's fusion"


@pytest.mark.parametrize("form", ["paper", "foret"])
def test_groups_are_traced_once(form):
    traced = []

    def counting_loss(params, batch):
        traced.append(batch.shape)
        return loss_fn(params, batch)

    gradient = sam_optax.value_and_grad(counting_loss, m=2, m_sharpness=form)
    params = [jnp.eye(8)] * 2
    jax.jit(gradient).lower(params, jnp.ones((16, 8)))
    assert traced == [(2, 8), (16 if form == "paper" else 8, 8)]
