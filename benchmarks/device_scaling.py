"""What a step costs each of 1, 2, 4 and 8 devices, batch and devices growing together.

  python benchmarks/device_scaling.py [--json FILE]

CPU devices of one machine: FLOPs, memory and collectives are exact, and are those of one device.
The wall-clock is of devices that share the cores, so only its ratio to plain on as many devices
says anything. For pod slices there is `tpu_cost.py`.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from compiled import cost
from finetune.loss import make_loss_fn
from finetune.model import T5, count_parameters
from hlo import collectives
from step_cost import SIZES, interleaved, make_batch

DEVICES = (1, 2, 4, 8)


def make_steps(loss_fn, optimizer) -> dict:
    """Plain, ours, and ours with every device a group of its own."""
    gradients = {
        "plain": jax.value_and_grad(loss_fn),
        "a/b = 1/4": sam_optax.value_and_grad(loss_fn, data_axes="data"),
        "groups = devices": sam_optax.value_and_grad(loss_fn, data_axes="data", group_axes="data"),
    }

    def from_gradient(gradient):
        def step(params, state, batch):
            loss, grads = gradient(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return step

    return {name: from_gradient(gradient) for name, gradient in gradients.items()}


def measure(devices: int, options: argparse.Namespace) -> dict:
    """Figures of each way on a mesh of so many devices, one device's share of them."""
    config = SIZES[options.size]
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    batch = make_batch(config.vocab_size, options.batch * devices, options.inputs, options.targets)
    model = T5(config)
    with_aux = make_loss_fn(model)
    params = jax.jit(model.init)(
        jax.random.key(0), batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    )["params"]
    optimizer = optax.adafactor(1e-3)
    params, state = jax.device_put((params, optimizer.init(params)), everywhere)
    arguments = (params, state, jax.device_put(batch, split))
    rows, compiled = {}, {}
    shardings = {"out_shardings": (everywhere, everywhere, everywhere)}
    with jax.set_mesh(mesh):
        for name, step in make_steps(lambda p, b: with_aux(p, b)[0], optimizer).items():
            figures, compiled[name] = cost(step, *arguments, **shardings)
            moved = collectives(compiled[name].as_text(), {"data": devices})
            rows[name] = {
                "flops": figures.flops,
                "temporary_bytes": figures.temporary_bytes,
                "collective_bytes": sum(c.bytes * c.times for c in moved),
                "collectives": sum(c.times for c in moved),
            }
        names = dict.fromkeys(compiled, arguments)
        seconds = interleaved(compiled, names, dict.fromkeys(compiled, 1), options.rounds)
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    return {"devices": devices, "parameters": count_parameters(params), "steps": rows}


def table(results: list[dict]) -> str:
    """A row for each way and number of devices, as ratios to plain on as many."""
    lines = [
        "| devices | step | FLOPs | bytes in collectives | temporaries | wall-clock |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        plain = result["steps"]["plain"]
        for name, row in result["steps"].items():
            alone = result["devices"] == 1
            moved = "" if alone else f"{row['collective_bytes'] / plain['collective_bytes']:.3f}"
            lines.append(
                f"| {result['devices']} | {name} | {row['flops'] / plain['flops']:.3f} "
                f"| {moved} | {row['temporary_bytes'] / plain['temporary_bytes']:.2f} "
                f"| {row['seconds'] / plain['seconds']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--batch", type=int, default=8, help="examples a device")
    parser.add_argument("--inputs", type=int, default=48)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--devices", type=int, nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    results = [measure(devices, options) for devices in options.devices]
    print(table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
