"""A layer of two parameters, small enough to compile a hundred times; its gradient by hand."""

import jax.numpy as jnp
import numpy as np

RHO = 0.1
SHARDS = 4  # of the batch: each gives its first example of four to the ascent


def layer_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(4, 8)) / 2, jnp.float32),
        "b": jnp.asarray(rng.normal(size=8) / 8, jnp.float32),
    }


def layer_batch(seed=0):
    rng = np.random.default_rng(1000 + seed)
    return {
        "x": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    }


def layer_loss(params, batch):
    outputs = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return jnp.mean(jnp.square(outputs - batch["y"]))


def gradient_by_hand(params, batch):
    """Backpropagation of `layer_loss` in float64, written out."""
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"], np.float64)
    outputs = np.tanh(x @ params["w"] + params["b"])
    back = 2 * (outputs - y) / y.size * (1 - outputs**2)
    return {"w": x.T @ back, "b": back.sum(0)}


def sam_gradient_by_hand(params, batch, rho=RHO, shards=SHARDS):
    """Algorithm 1, lines 5 to 7, in float64: the first quarter of every shard ascends."""
    params = {k: np.asarray(w, np.float64) for k, w in params.items()}
    b = len(batch["x"])
    first = np.arange(b) % (b // shards) < max(b // shards // 4, 1)
    g = gradient_by_hand(params, {k: np.asarray(v)[first] for k, v in batch.items()})
    length = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
    w_adv = {k: params[k] + rho * g[k] / length for k in params}
    return gradient_by_hand(w_adv, batch)
