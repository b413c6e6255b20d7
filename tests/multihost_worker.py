"""Five SAM steps on a mesh of 8 CPU devices, as one process or as one of two.

  python multihost_worker.py CHECKPOINT_DIR [COORDINATOR PROCESS_ID]

Every process makes the examples of its own devices only. The last line printed is a digest of the
final parameters; all processes write the checkpoint together.
"""

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import mlp_batch, mlp_loss, mlp_params

import sam_optax

OPTIONS = {
    "one point": {"data_axes": "data"},
    "groups": {"data_axes": "data", "group_axes": "data"},
}


def global_batch(mesh, step):
    """The batch of all processes, from the rows that each one's devices hold."""
    whole = mlp_batch(step, b=32)
    sharding = NamedSharding(mesh, P("data"))

    def assemble(rows):
        mine = 32 // jax.process_count()
        first = mine * jax.process_index()
        local = np.asarray(rows)[first : first + mine]
        return jax.make_array_from_process_local_data(sharding, local, rows.shape)

    return jax.tree.map(assemble, whole)


def train(mesh, options):
    tx = sam_optax.sharpness_aware(optax.adam(0.01), rho=0.1, **options)
    replicated = NamedSharding(mesh, P())
    params = jax.device_put(mlp_params(), replicated)
    state = jax.jit(tx.init, out_shardings=replicated)(params)

    @jax.jit
    def train_step(params, state, batch):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
        return optax.apply_updates(params, updates), state

    for step in range(5):
        params, state = train_step(params, state, global_batch(mesh, step))
    return params


def main():
    if len(sys.argv) > 2:
        jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        results = {name: train(mesh, options) for name, options in OPTIONS.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(sys.argv[1]).resolve(), results)
    local = jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), results)
    digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(local))).hexdigest()
    print(f"devices {jax.local_device_count()} of {jax.device_count()}")
    print(digest)


if __name__ == "__main__":
    main()
