"""What one step costs on one device, as a ratio to the plain step.

  python benchmarks/step_cost.py [--rounds 10] [--json FILE]

A T5.1.1 of about 10M parameters with Adafactor: plain, `optax.contrib.sam` (opaque), and ours
with the ascent on all, 1/4 and 1/8 of the batch, and with m = 4 groups both ways. FLOPs and memory
are the compiler's; the wall-clock is the median over rounds in which every step runs once, in turn.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import sam_optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from compiled import cost
from finetune.loss import make_loss_fn
from finetune.model import T5, T5Config, count_parameters

CONFIG = T5Config(
    vocab_size=4096,
    d_model=256,
    num_heads=4,
    head_dim=64,
    d_ff=1024,
    num_encoder_layers=3,
    num_decoder_layers=3,
    dropout_rate=0.0,
)
RHO = 0.15


def make_batch(b: int, inputs: int, targets: int) -> dict[str, jax.Array]:
    """Random tokens; the cost does not depend on them."""
    rng = np.random.default_rng(0)
    source = rng.integers(1, CONFIG.vocab_size, (b, inputs))
    target = rng.integers(1, CONFIG.vocab_size, (b, targets))
    return {
        "encoder_input_tokens": jnp.asarray(source, jnp.int32),
        "decoder_input_tokens": jnp.asarray(np.roll(target, 1, axis=1), jnp.int32),
        "decoder_target_tokens": jnp.asarray(target, jnp.int32),
        "decoder_loss_weights": jnp.ones((b, targets), jnp.float32),
    }


def make_steps(loss_fn) -> dict:
    """Every way of taking a step, as `name -> (optimizer, step(params, state, batch))`."""
    base = optax.adafactor(1e-3)

    def from_gradient(gradient):
        def step(params, state, batch):
            loss, grads = gradient(params, batch)
            updates, state = base.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return base, step

    theirs = optax.contrib.sam(
        base, optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), opaque_mode=True
    )

    def their_step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = theirs.update(
            grads, state, params, grad_fn=lambda p, _: jax.grad(loss_fn)(p, batch)
        )
        return optax.apply_updates(params, updates), state, loss

    def ours(fraction, **options):
        return from_gradient(sam_optax.value_and_grad(loss_fn, RHO, fraction, **options))

    return {
        "plain": from_gradient(jax.value_and_grad(loss_fn)),
        "optax.contrib.sam": (theirs, their_step),
        "a/b = 1": ours(1.0),
        "a/b = 1/4": ours(0.25),
        "a/b = 1/8": ours(0.125),
        "m = 4, paper": ours(0.25, m=4),
        "m = 4, Foret": ours(0.25, m=4, m_sharpness="foret"),
    }


def interleaved_medians(compiled: dict, arguments: dict, rounds: int) -> dict[str, float]:
    """Median of seconds per step; every round runs each step once, so drift hits all alike."""
    seconds = {name: [] for name in compiled}
    for round_number in range(rounds + 1):
        for name, step in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments[name]))
            if round_number:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(b: int, inputs: int, targets: int, rounds: int, names: list[str] | None = None) -> dict:
    """Measure plain and the named steps, or all, and return figures and ratios to plain."""
    model = T5(CONFIG)
    with_aux = make_loss_fn(model)
    batch = make_batch(b, inputs, targets)
    params = model.init(
        jax.random.key(0), batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    )["params"]

    costs, compiled, arguments = {}, {}, {}
    steps = make_steps(lambda p, batch: with_aux(p, batch)[0])
    for name, (optimizer, step) in steps.items():
        if names is not None and name not in ("plain", *names):
            continue
        arguments[name] = (params, optimizer.init(params), batch)
        costs[name], compiled[name] = cost(step, *arguments[name])
        print(f"compiled {name}", file=sys.stderr)
    seconds = interleaved_medians(compiled, arguments, rounds)

    plain, copy = costs["plain"], 4 * count_parameters(params)
    rows = {
        name: {
            "flops": c.flops / plain.flops,
            "bytes_accessed": c.bytes_accessed / plain.bytes_accessed,
            "temporaries": c.temporary_bytes / plain.temporary_bytes,
            "extra_copies_of_params": (c.temporary_bytes - plain.temporary_bytes) / copy,
            "compile": c.compile_seconds / plain.compile_seconds,
            "wall_clock": seconds[name] / seconds["plain"],
        }
        for name, c in costs.items()
    }
    return {
        "parameters": count_parameters(params),
        "batch": {"examples": b, "inputs": inputs, "targets": targets},
        "plain": plain._asdict() | {"seconds": seconds["plain"]},
        "rounds": rounds,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "ratios_to_plain": rows,
    }


def table(result: dict) -> str:
    """The ratios as a Markdown table."""
    head = (
        "| step | FLOPs | bytes accessed | temporaries | extra copies of the parameters "
        "| compile time | wall-clock |\n|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {name} | {r['flops']:.3f} | {r['bytes_accessed']:.2f} | {r['temporaries']:.2f} "
        f"| {r['extra_copies_of_params']:+.2f} | {r['compile']:.2f} | {r['wall_clock']:.2f} |"
        for name, r in result["ratios_to_plain"].items()
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="examples, a multiple of 32")
    parser.add_argument("--inputs", type=int, default=48, help="input tokens an example")
    parser.add_argument("--targets", type=int, default=16, help="target tokens an example")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each step")
    parser.add_argument(
        "--steps", nargs="+", choices=make_steps(jnp.sum), metavar="STEP", help="these and plain"
    )
    parser.add_argument("--json", type=Path, help="where to save the figures")
    args = parser.parse_args()
    result = measure(args.batch, args.inputs, args.targets, args.rounds, args.steps)
    plain = result["plain"]
    print(
        f"{result['parameters'] / 1e6:.1f}M parameters, batch {args.batch} of {args.inputs}/"
        f"{args.targets} tokens, {result['device']}, jax {result['jax']}\n"
        f"plain: {plain['flops'] / 1e9:.1f} GFLOP, {plain['temporary_bytes'] / 2**20:.0f} MiB of "
        f"temporaries, {plain['seconds']:.2f} s a step, median of {args.rounds}; "
        f"compiled in {plain['compile_seconds']:.1f} s\n\nRatios to the plain step:\n"
    )
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
