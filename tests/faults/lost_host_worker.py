"""One of two hosts that train with SAM and save a checkpoint every other step, until one is lost.

  python lost_host_worker.py CHECKPOINTS COORDINATOR PROCESS_ID [MOMENT OPERATION]

Every step prints its number and a digest of the parameters. With MOMENT "step" the host kills
itself before step OPERATION; with "save", at that file operation of its second save.
"""

import hashlib
import os
import signal
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

STEPS, SAVE_EVERY, HEARTBEAT_TIMEOUT = 200, 2, 5
SIZES = (64, 512, 8)
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_operation(number, saving):
    done = []

    def operation(event, _):
        if saving and event in FILE_OPERATIONS:
            done.append(event)
            if len(done) == number:
                die()

    sys.addaudithook(operation)


def digest(tree):
    local = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(x.tobytes() for x in local)).hexdigest()


def global_batch(sharding, step):
    """The batch of both hosts, from the examples of this one's devices."""

    def assemble(rows):
        mine = len(rows) // jax.process_count()
        first = mine * jax.process_index()
        local = np.asarray(rows)[first : first + mine]
        return jax.make_array_from_process_local_data(sharding, local, rows.shape)

    return jax.tree.map(assemble, mlp_batch(step, b=16, sizes=SIZES))


def main():
    directory, coordinator, process, *moment = sys.argv[1:]
    jax.distributed.initialize(
        coordinator,
        num_processes=2,
        process_id=int(process),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, P())
    tx = sam_optax.sharpness_aware(optax.adam(1e-3), rho=0.05, data_axes="data")
    params = jax.device_put(mlp_params(sizes=SIZES), replicated)
    state = jax.jit(tx.init, out_shardings=replicated)(params)

    @jax.jit
    def train_step(params, state, batch):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
        return optax.apply_updates(params, updates), state

    saving = []
    if moment and moment[0] == "save":
        die_at_file_operation(int(moment[1]), saving)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(Path(directory).resolve(), options=options) as manager:
        for step in range(1, STEPS + 1):
            if moment == ["step", str(step)]:
                die()
            with jax.set_mesh(mesh):
                params, state = train_step(
                    params, state, global_batch(NamedSharding(mesh, P("data")), step)
                )
            print(step, digest((params, state)), flush=True)
            if step % SAVE_EVERY == 0:
                saving[:] = [step] if step == 2 * SAVE_EVERY else []
                manager.save(step, args=ocp.args.StandardSave((params, state)))
                saving.clear()
    print("finished")


if __name__ == "__main__":
    main()
