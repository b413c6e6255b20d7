import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune.landscape import (
    loss_along,
    random_unit_direction,
    top_hessian_eigenpair,
    unit_gradient,
)
from jax.flatten_util import ravel_pytree


def _quadratic(eigenvalues):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues),) * 2))[0]
    matrix = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T, jnp.float32)
    return matrix, lambda params: 0.5 * ravel_pytree(params)[0] @ matrix @ ravel_pytree(params)[0]


def test_quadratic_with_a_larger_negative_eigenvalue():
    # The top eigenvalue is the largest, not the largest in size.
    matrix, loss = _quadratic(np.array([-9.0, -1.0, 0.0, 0.5, 2.0, 4.0]))
    top = top_hessian_eigenpair(loss, {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, tolerance=1e-5)
    assert top.value == pytest.approx(4, rel=1e-4)
    vector = ravel_pytree(top.vector)[0]
    np.testing.assert_allclose(matrix @ vector, 4 * vector, atol=1e-3)
    assert float(jnp.linalg.norm(vector)) == pytest.approx(1, rel=1e-5)


def test_small_network_against_the_whole_hessian():
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (20, 3)), jax.random.normal(keys[1], (20,))
    params = {"in": jax.random.normal(keys[2], (3, 6)), "out": jax.random.normal(keys[3], (6,))}
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - y) ** 2)  # noqa: E731
    flat, unravel = ravel_pytree(params)
    whole = jax.hessian(lambda w: loss(unravel(w)))(flat)
    top = top_hessian_eigenpair(loss, params, max_steps=24, tolerance=1e-4)
    assert top.value == pytest.approx(float(jnp.linalg.eigvalsh(whole)[-1]), rel=1e-3)
    assert top.relative_residual <= 1e-4


def test_residual_is_that_of_the_definition_and_shrinks():
    matrix, loss = _quadratic(np.linspace(1, 2, 60))
    residuals = []
    for steps in (3, 12):
        top = top_hessian_eigenpair(loss, jnp.ones(60), max_steps=steps, tolerance=0)
        by_definition = jnp.linalg.norm(matrix @ top.vector - top.value * top.vector) / top.value
        assert top.relative_residual == pytest.approx(float(by_definition), rel=0.02)
        residuals.append(top.relative_residual)
    assert residuals[1] < residuals[0] / 2


def test_stops_as_soon_as_converged():
    # Rank one: the first product already spans the answer, and nothing is left to continue with.
    _, loss = _quadratic(np.array([5.0, 0, 0, 0, 0, 0, 0, 0]))
    assert top_hessian_eigenpair(loss, jnp.ones(8), tolerance=1e-4).value == pytest.approx(5)


def test_loss_along_a_direction():
    def loss(params):
        return jnp.sum(params["a"] ** 2)

    values = loss_along(loss, {"a": jnp.ones(1)}, {"a": jnp.full(1, 2.0)}, [-1, 0, 0.5])
    assert values == [1, 1, 4]


def test_unit_gradient_points_uphill_with_length_one():
    direction = unit_gradient(lambda p: p["a"] ** 2 - 0.5 * p["b"], {"a": 2.0, "b": 1.0})
    length = np.hypot(4, 0.5)
    assert direction == pytest.approx({"a": 4 / length, "b": -0.5 / length})


def test_random_direction_is_a_unit_vector_fixed_by_its_seed():
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    first, again, other = (ravel_pytree(random_unit_direction(params, s))[0] for s in (0, 0, 1))
    assert float(jnp.linalg.norm(first)) == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
