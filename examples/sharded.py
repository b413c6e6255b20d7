"""SAM on a mesh: a loop with the batch sharded over 4 devices and the parameters over 2.

    python sharded.py

It makes eight devices of the CPU. What differs on a pod is marked below.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()
if args.steps < 1:
    parser.error(f"--steps {args.steps}: give 1 or more")

jax.config.update("jax_num_cpu_devices", 8)  # on a pod: jax.distributed.initialize()
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
jax.set_mesh(mesh)


shardings = {
    "in": NamedSharding(mesh, P(None, "model")),
    "out": NamedSharding(mesh, P("model", None)),
    "batch": NamedSharding(mesh, P("data")),
}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def init(key):
    keys = jax.random.split(key, 2)
    return {
        "in": jax.random.normal(keys[0], (16, 256)) / 4,
        "out": jax.random.normal(keys[1], (256, 4)) / 16,
    }


def batches(steps):
    rng = np.random.default_rng(0)  # on a pod: another seed, or other files, on each host
    teacher = np.linspace(-0.3, 0.3, 64).reshape(16, 4)
    for _ in range(steps):
        x = rng.normal(size=(64, 16)).astype(np.float32)
        y = np.sin(x @ teacher).astype(np.float32)
        # Each host gives the examples that it has, and none is copied to another.
        put = partial(jax.make_array_from_process_local_data, shardings["batch"])
        yield {"x": put(x), "y": put(y)}


def train(**settings):
    tx = sam_optax.sharpness_aware(optax.adam(3e-3), rho=0.05, **settings)

    @jax.jit
    def train_step(params, state, batch):
        updates, state, info = tx.update(
            None,
            state,
            params,
            grad_fn=jax.value_and_grad(loss_fn),
            batch=batch,
            return_info=True,
        )
        return optax.apply_updates(params, updates), state, info.descent_loss

    on_devices = {name: shardings[name] for name in ("in", "out")}
    params = jax.jit(init, out_shardings=on_devices)(jax.random.key(0))
    state = tx.init(params)  # not in jit, which would not shard it as the parameters are
    losses = []
    for batch in batches(args.steps):
        params, state, loss = train_step(params, state, batch)
        losses.append(float(loss))
    return losses


batch = next(batches(1))
ascent_batch = sam_optax.ascent_batch(batch, data_axes="data")
print(f"{mesh.size} devices, {dict(mesh.shape)}")
print(f"{len(batch['x'])} examples a batch, {len(ascent_batch['x'])} of them for the ascent")

# Say once how the batch is sharded: each data shard then gives a quarter of its own examples to
# the ascent, and no example moves. Groups have an adversarial point each, and the step reduces one
# gradient over the pod in place of two.
for settings in ({"data_axes": "data"}, {"data_axes": "data", "group_axes": "data"}):
    losses = train(**settings)
    print(f"{settings}: loss {losses[0]:.3f} in step 1, {losses[-1]:.3f} in step {len(losses)}")
