"""What one step costs on one device, as a ratio to the plain step, against what others do.

  python benchmarks/step_cost.py                                    # every way, one table
  python benchmarks/step_cost.py --grid --json benchmarks/results/step_cost.json
  python benchmarks/step_cost.py --size base --batch 128 --inputs 512 --targets 62 \\
    --max_gflop 1e9                                                 # on a GPU

T5.1.1s of 1M to 100M parameters in float32, and small, base and large as published in bfloat16,
with Adafactor. FLOPs and memory are the compiler's; the wall-clock is the median over rounds in
which every way takes a step, in turn. With `--json` each cell (a size and a batch) is saved when it
is done, and the same command goes on where it stopped: a file for each machine.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from compiled import Cost, cost, timed_compilation
from finetune.loss import make_loss_fn
from finetune.model import PUBLIC_SIZES, T5, T5Config, count_parameters
from ways import NAMES, Way, ways


def _size(d_model: int, heads: int, d_ff: int, layers: int, vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=d_model,
        num_heads=heads,
        head_dim=64,
        d_ff=d_ff,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
    )


SIZES = {
    "1M": _size(128, 2, 256, 2, 1024),
    "10M": _size(256, 4, 1024, 3, 4096),
    "30M": _size(512, 8, 1024, 4, 4096),
    "100M": _size(768, 12, 2048, 5, 8192),
    **{
        size: PUBLIC_SIZES[size](dtype="bfloat16", dropout_rate=0.0)
        for size in ("small", "base", "large")
    },
}
BASE = ("10M", 32)
"""The cell that every way is measured in; the grid has a few ways in every cell."""
GRID_WAYS = (
    "optax.contrib.sam, opaque",
    "two bare passes, a/b = 1/4",
    "a/b = 1/4",
    "m = 4, Foret",
)
BATCHES = (8, 32, 128, 512)


def make_batch(vocabulary: int, b: int, inputs: int, targets: int) -> dict[str, jax.Array]:
    """Random tokens; the cost does not depend on them."""
    rng = np.random.default_rng(0)
    source = rng.integers(1, vocabulary, (b, inputs))
    target = rng.integers(1, vocabulary, (b, targets))
    return {
        "encoder_input_tokens": jnp.asarray(source, jnp.int32),
        "decoder_input_tokens": jnp.asarray(np.roll(target, 1, axis=1), jnp.int32),
        "decoder_target_tokens": jnp.asarray(target, jnp.int32),
        "decoder_loss_weights": jnp.ones((b, targets), jnp.float32),
    }


def interleaved(compiled: dict, arguments: dict, calls: dict, rounds: int) -> dict:
    """Seconds per step; every round takes a step each way, so drift hits all alike."""
    seconds = {name: [] for name in compiled}
    for round_number in range(rounds + 1):
        for name, step in compiled.items():
            params, state, batch = arguments[name]
            start = time.perf_counter()
            for _ in range(calls[name]):
                params, state, loss = step(params, state, batch)
            jax.block_until_ready((params, state, loss))
            if round_number:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
            del params, state
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(size: str, b: int, names: list[str], options: argparse.Namespace) -> dict:
    """Measure plain and the named ways, and return figures and ratios to plain."""
    model = T5(SIZES[size])
    with_aux = make_loss_fn(model)
    batch = make_batch(SIZES[size].vocab_size, b, options.inputs, options.targets)
    tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]
    every = ways(lambda p, batch: with_aux(p, batch)[0])
    chosen: dict[str, Way] = {
        name: every[name] for name in ("plain", *names) if b % every[name].shares == 0
    }

    def compile_one(name: str) -> tuple[Cost, Any]:
        way = chosen[name]
        one, step = cost(way.step, shapes, jax.eval_shape(way.init, shapes), batch)
        print(f"{size}, batch {b}: compiled {name}", file=sys.stderr)
        return one._replace(
            flops=one.flops * way.calls, bytes_accessed=one.bytes_accessed * way.calls
        ), step

    with ThreadPoolExecutor(options.threads) as pool:
        both = dict(zip(chosen, pool.map(compile_one, chosen), strict=True))
    costs = {name: one for name, (one, _) in both.items()}
    compiled = {name: step for name, (_, step) in both.items()}

    for _ in range(options.compilations - 1):
        for name, way in chosen.items():
            _, again = timed_compilation(way.step, shapes, jax.eval_shape(way.init, shapes), batch)
            fastest = min(again, costs[name].compile_seconds)
            costs[name] = costs[name]._replace(compile_seconds=fastest)

    seconds = {}
    if costs["plain"].flops <= 1e9 * options.max_gflop:
        params = jax.jit(model.init)(jax.random.key(0), *tokens)["params"]
        arguments = {name: (params, way.init(params), batch) for name, way in chosen.items()}
        calls = {name: way.calls for name, way in chosen.items()}
        seconds = interleaved(compiled, arguments, calls, options.rounds)
    parameters = count_parameters(shapes)
    return {
        "size": size,
        "parameters": parameters,
        "batch": {"examples": b, "inputs": options.inputs, "targets": options.targets},
        "plain": costs["plain"]._asdict() | {"seconds": seconds.get("plain")},
        "rounds": options.rounds if seconds else 0,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "ratios_to_plain": _ratios(costs, seconds, 4 * parameters),
    }


def _ratios(costs: dict, seconds: dict, copy: int) -> dict[str, dict]:
    plain = costs["plain"]
    return {
        name: {
            "flops": c.flops / plain.flops,
            "bytes_accessed": c.bytes_accessed / plain.bytes_accessed,
            "temporaries": c.temporary_bytes / plain.temporary_bytes,
            "extra_copies_of_params": (c.temporary_bytes - plain.temporary_bytes) / copy,
            "compile": c.compile_seconds / plain.compile_seconds,
            "wall_clock": seconds[name] / seconds["plain"] if seconds else None,
        }
        for name, c in costs.items()
    }


def table(result: dict) -> str:
    """The ratios of a cell as a Markdown table."""
    head = (
        "| step | FLOPs | bytes accessed | temporaries | extra copies of the parameters "
        "| compile time | wall-clock |\n|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {name} | {r['flops']:.3f} | {r['bytes_accessed']:.2f} | {r['temporaries']:.2f} "
        f"| {r['extra_copies_of_params']:+.2f} | {r['compile']:.2f} "
        f"| {'' if r['wall_clock'] is None else format(r['wall_clock'], '.2f')} |"
        for name, r in result["ratios_to_plain"].items()
    ]
    return "\n".join([head, *lines])


def heading(result: dict) -> str:
    """What a cell's ratios are ratios to."""
    plain, batch = result["plain"], result["batch"]
    timed = (
        f"{plain['seconds']:.2f} s a step, median of {result['rounds']}; "
        if plain["seconds"]
        else ""
    )
    return (
        f"{result['parameters'] / 1e6:.1f}M parameters, batch {batch['examples']} of "
        f"{batch['inputs']}/{batch['targets']} tokens, {result['device']}, jax {result['jax']}\n"
        f"plain: {plain['flops'] / 1e9:.1f} GFLOP, {plain['temporary_bytes'] / 2**20:.0f} MiB of "
        f"temporaries, {timed}compiled in {plain['compile_seconds']:.1f} s"
    )


def wanted(options: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """The cells to measure, each with its ways."""
    if not options.grid:
        names = options.steps or list(NAMES[1:])
        return [(size, b, names) for size in options.size for b in options.batch]
    cells = [(size, b) for size in ("1M", "10M", "100M") for b in BATCHES]
    cells = [BASE, *(cell for cell in cells if cell != BASE)]
    return [(*cell, list(NAMES[1:] if cell == BASE else GRID_WAYS)) for cell in cells]


def _saved(path: Path | None) -> list[dict]:
    return json.loads(path.read_text())["cells"] if path and path.exists() else []


def _save(path: Path, cells: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    partial.replace(path)


def _key(result: dict) -> tuple:
    return result["size"], tuple(result["batch"].values())


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=[BASE[0]])
    parser.add_argument("--batch", nargs="+", type=int, default=[BASE[1]], help="examples")
    parser.add_argument("--grid", action="store_true", help="three sizes by four batches")
    parser.add_argument("--inputs", type=int, default=48, help="input tokens an example")
    parser.add_argument("--targets", type=int, default=16, help="target tokens an example")
    parser.add_argument(
        "--compilations", type=int, default=1, help="of each way, in turn; the fastest counts"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="compilations at once; more blur the compile times"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each way")
    parser.add_argument(
        "--max_gflop", type=float, default=250, help="a larger plain step is not timed"
    )
    parser.add_argument("--steps", nargs="+", choices=NAMES, metavar="STEP", help="and plain")
    parser.add_argument("--json", type=Path, help="where to save the figures")
    options = parser.parse_args()
    cells = _saved(options.json)
    for size, b, names in wanted(options):
        key = (size, (b, options.inputs, options.targets))
        result = next((cell for cell in cells if _key(cell) == key), None)
        if result is None:
            result = measure(size, b, names, options)
            cells.append(result)
            if options.json:
                _save(options.json, cells)
        print(f"{heading(result)}\n\nRatios to the plain step:\n\n{table(result)}\n", flush=True)
        gc.collect()  # the executables of a cell hold its constants


if __name__ == "__main__":
    main()
