"""What a step sends between two slices of a pod, over the slow network, without a TPU.

  pip install -e ".[tpu-aot]" && python benchmarks/two_slices.py
  python benchmarks/two_slices.py --t5x --topology v5e:2x2  # T5X's step, where T5X is installed

Compiles SAM of a small network for two slices with libtpu's compiler, as `tpu_cost.py` does for
one. Within a slice XLA reduces a gradient by collectives. Between slices each chip sends its part.
"""

import os

os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    JAX_PLATFORMS="cpu",
)

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hlo import sent_between_slices
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

D_MODEL, D_FF, LAYERS = 512, 2048, 2
EXAMPLES_OF_A_SHARD = 8
BATCH_AXES = ("slice", "data")
LAYOUTS = {"replicated": None, "FSDP in each slice": "data"}  # the axis of the parameters' d_model


def two_slices(topology: str, model_shards: int) -> Mesh:
    """The mesh of two slices, a slice's chips as `data` x `model`."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=2)
    devices = sorted(description.devices, key=lambda device: (device.slice_index, device.id))
    return Mesh(np.array(devices).reshape(2, -1, model_shards), (*BATCH_AXES, "model"))


def loss_fn(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """A residual network's squared error."""
    x = batch["x"]
    for layer in params:
        x = x + jnp.tanh(x @ layer["wi"]) @ layer["wo"]
    return jnp.mean((x - batch["y"]) ** 2)


def make_steps(layout: str) -> dict[str, Callable]:
    """The gradients to compare, by name."""
    ours = functools.partial(sam_optax.value_and_grad, loss_fn, data_axes=BATCH_AXES)
    steps = {
        "plain": jax.value_and_grad(loss_fn),
        "ours": ours(),
        "groups = slices": ours(group_axes="slice"),
        "groups = slices, in bf16": ours(group_axes="slice", reduction_dtype=jnp.bfloat16),
    }
    if layout == "replicated":  # each of these shards needs the parameters whole
        groups = functools.partial(ours, group_axes=BATCH_AXES)
        steps["ours, ascent in bf16"] = ours(reduction_dtype=jnp.bfloat16)
        whole = functools.partial(ours, group_axes="slice", replicated_params=True)
        steps["groups = slices, replicated_params"] = whole()
        steps["groups = slices, replicated_params, in bf16"] = whole(reduction_dtype=jnp.bfloat16)
        steps["groups = shards"] = groups()
        steps["groups = shards, in bf16"] = groups(reduction_dtype=jnp.bfloat16)
    return steps


def sent_bytes(gradient: Callable, mesh: Mesh, layout: str) -> int:
    """Compile a step of gradient descent: how many bytes does a chip send to the other slice?"""

    def array(shape: tuple[int, ...], *spec: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    axis = LAYOUTS[layout]
    layer = {
        "wi": array((D_MODEL, D_FF), axis, "model"),
        "wo": array((D_FF, D_MODEL), "model", axis),
    }
    params = [layer] * LAYERS
    examples = EXAMPLES_OF_A_SHARD * mesh.shape["slice"] * mesh.shape["data"]
    batch = dict.fromkeys("xy", array((examples, D_MODEL), BATCH_AXES))

    def step(params, batch):
        loss, grads = gradient(params, batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), loss

    where = jax.tree.map(lambda w: w.sharding, params), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        program = jax.jit(step, out_shardings=where).lower(params, batch).compile()
    return sent_between_slices(program.as_text())


def t5x_programs(mesh: Mesh) -> dict[str, Callable[[], jax.stages.Compiled]]:
    """T5X's steps, of Base's width and 2+2 layers, on its mesh for several slices."""
    import t5x_tpu_cost

    from sam_optax.t5x_trainer import SharpnessAwareTrainer

    of_slices = functools.partial(SharpnessAwareTrainer, group_axes="replica")
    of_shards = functools.partial(SharpnessAwareTrainer, group_axes=("replica", "data"))
    trainers = {
        "plain": t5x_tpu_cost.STEPS["plain"],
        "ours": SharpnessAwareTrainer,
        "groups = slices": of_slices,
        "groups = slices, in bf16": functools.partial(of_slices, reduction_dtype="bfloat16"),
        "groups = shards": of_shards,
        "groups = shards, in bf16": functools.partial(of_shards, reduction_dtype="bfloat16"),
    }
    config = t5x_tpu_cost.SIZES["mini"]
    mesh = Mesh(mesh.devices, ("replica", "data", "model"))
    return {
        name: lambda made=made: t5x_tpu_cost.compile_step(config, made, mesh).program
        for name, made in trainers.items()
    }


def table(title: str, sent_by: dict[str, Callable[[], int]]) -> dict[str, int]:
    """Print what each step sends, as a ratio to the first one's, when it is compiled; return it."""
    print(f"\n{title}; sent between slices, plain = 1:\n\n| step | bytes |\n|---|---|")
    found: dict[str, int] = {}
    for name, sent in sent_by.items():
        found[name] = sent()
        print(f"| {name} | {found[name] / found['plain']:.2f} |", flush=True)
    return found


def main() -> None:
    """Print the tables, and save the bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4", help="of one slice (default: v5e:4x4)")
    parser.add_argument("--model_shards", type=int, default=1)
    parser.add_argument("--t5x", action="store_true", help="T5X's step, at an effort of -1")
    parser.add_argument("--json", type=Path, help="where to save what a chip sends, in bytes")
    options = parser.parse_args()
    results = {}
    mesh = two_slices(options.topology, options.model_shards)
    if options.t5x:
        jax.config.update("jax_optimization_level", "O0")
        sent_by = {
            name: lambda made=made: sent_between_slices(made().as_text())
            for name, made in t5x_programs(mesh).items()
        }
        results["T5X"] = table(f"T5X, {dict(mesh.shape)}", sent_by)
    else:
        for layout in LAYOUTS:
            sent_by = {
                name: functools.partial(sent_bytes, gradient, mesh, layout)
                for name, gradient in make_steps(layout).items()
            }
            results[layout] = table(f"Parameters {layout}, {dict(mesh.shape)}", sent_by)
    if options.json:
        of = {"topology": f"2 x {options.topology}", "mesh": dict(mesh.shape)}
        options.json.write_text(json.dumps(of | {"sent_bytes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
