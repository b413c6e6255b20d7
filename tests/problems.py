"""Small problems with known answers, shared by the tests."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np


def mlp_params(seed=0, sizes=(5, 7, 3), dtype=jnp.float32):
    """Parameters of a two-layer network, as a nested dict."""
    rng = np.random.default_rng(seed)
    d_in, d_hidden, d_out = sizes
    return {
        "hidden": {
            "kernel": jnp.asarray(rng.normal(size=(d_in, d_hidden)) / np.sqrt(d_in), dtype),
            "bias": jnp.asarray(0.1 * rng.normal(size=(d_hidden,)), dtype),
        },
        "out": {"kernel": jnp.asarray(rng.normal(size=(d_hidden, d_out)) / 2, dtype)},
    }


def mlp_batch(seed=0, b=16, sizes=(5, 7, 3)):
    """A regression batch of b examples."""
    rng = np.random.default_rng(1000 + seed)
    return {
        "x": jnp.asarray(rng.normal(size=(b, sizes[0])), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(b, sizes[-1])), jnp.float32),
    }


@functools.partial(jax.jit, inline=True)
def mlp_outputs(params, x):
    """Forward pass."""
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["out"]["kernel"]


@functools.partial(jax.jit, inline=True)
def mlp_loss(params, batch):
    """Mean squared error over examples and outputs."""
    return jnp.mean(jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]))


def examples_last(params, batch):
    """`mlp_loss` of a batch whose examples lie along the last axis."""
    return mlp_loss(params, jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), batch))


def first(batch, n):
    """The first n examples of every leaf."""
    return jax.tree.map(lambda x: x[:n], batch)


def norm64(tree):
    """Global l2 norm in float64, by NumPy."""
    return np.sqrt(
        sum(np.sum(np.abs(np.asarray(x, np.complex128)) ** 2) for x in jax.tree.leaves(tree))
    )


def assert_trees_equal(a, b):
    """Assert the same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes(), f"{x} != {y}"


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    """Assert the same structure and nearly the same numbers, whatever the dtypes."""
    as64 = [jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (a, b)]
    chex.assert_trees_all_close(*as64, rtol=rtol, atol=atol)
