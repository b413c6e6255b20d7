"""How much of the perturbation survives in low-precision parameters, on T5.1.1 at its real sizes.

  JAX_PLATFORMS=cpu python benchmarks/low_precision.py --sizes small

SAM's perturbation has the length rho, spread over all parameters: each moves by far less than the
256th of its size that bfloat16 resolves. For parameters in several dtypes, w_adv in the library's
default dtype or in the parameters' own, and layers that compute in float32 or in bfloat16, this
compares the perturbation that the layers see, w_adv - w with both cast as they cast them, with the
intended one: their lengths, the cosine between them, and how much they raise the loss. Weights are
at T5's initialisation, tokens are random: the gradient is a real model's, and its direction does
not matter here. Then it trains the smallest model from a bfloat16 checkpoint, with layers in
bfloat16, and compares the rise of the loss with that of layers in float32, from step to step.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from finetune.loss import make_loss_fn
from finetune.model import T5, T5Config, count_parameters, t5_1_1_base, t5_1_1_small
from step_cost import SIZES as SMALLER_SIZES
from step_cost import make_batch

RESULTS = Path(__file__).parent / "results" / "low_precision.json"
SIZES: dict[str, T5Config] = {
    "1M": SMALLER_SIZES["1M"],
    "small": t5_1_1_small(dropout_rate=0.0),
    "base": t5_1_1_base(dropout_rate=0.0),
}


class Case(NamedTuple):
    """Parameters, the point that they move to, and layers."""

    parameter_dtype: str
    adversarial_dtype: str | None = None
    layers: str = "float32"
    checkpoint: str = ""
    """How else the parameters were rounded before."""


CASES = [
    Case("float32"),
    Case("bfloat16"),
    Case("bfloat16", "bfloat16"),
    Case("float16"),
    Case("float16", "float16"),
    Case("float32", "bfloat16"),
    Case("float32", layers="bfloat16"),
    Case("float32", layers="bfloat16", checkpoint="bfloat16"),
    Case("float32", layers="bfloat16", checkpoint="bfloat16, dithered"),
    Case("bfloat16", layers="bfloat16"),
]
BATCH, INPUTS, TARGETS = 8, 32, 8
STEPS = (0, 1, 2, 3, 5, 10, 30, 100)
OPTIMIZERS = {
    "adafactor(1e-3)": optax.adafactor(1e-3),
    "adamw(1e-4)": optax.adamw(1e-4),
    "adamw(1e-5)": optax.adamw(1e-5),
}


def inner(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees."""
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))


def dithered(w: jax.Array, key: jax.Array) -> jax.Array:
    """Fill the bits that a bfloat16 checkpoint leaves empty: it rounds to the same numbers."""
    bits = jax.lax.bitcast_convert_type(w, jnp.int32)
    noise = jax.random.randint(key, w.shape, 1 - 2**15, 2**15)
    return jnp.where(w == 0, w, jax.lax.bitcast_convert_type(bits + noise, jnp.float32))


def prepare(wide: Any, case: Case) -> Any:
    """Return the parameters of a case."""
    if case.checkpoint:
        wide = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), wide)
    if case.checkpoint.endswith("dithered"):
        leaves, structure = jax.tree.flatten(wide)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        wide = jax.tree.unflatten(structure, map(dithered, leaves, keys))
    return jax.tree.map(lambda w: w.astype(case.parameter_dtype), wide)


def as_seen(w: jax.Array, layers: str) -> jax.Array:
    """Return a parameter as the layers compute with it: matrices are cast, norms' scales not."""
    return (w.astype(layers) if w.ndim > 1 else w).astype(jnp.float32)


def compare(model: T5, params: Any, batch: Any, rho: float, case: Case) -> dict:
    """Return what becomes of the perturbation of one step."""
    loss_fn = make_loss_fn(model)

    def with_point(params, batch):
        return loss_fn(params, batch)[0], params

    @jax.jit
    def step(params, batch):
        gradient = sam_optax.value_and_grad(
            with_point, rho, 1.0, has_aux=True, adversarial_dtype=case.adversarial_dtype
        )
        (adversarial_loss, w_adv), _ = gradient(params, batch)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        intended = sam_optax.gradient_perturbation(grads, params, rho)
        realised = jax.tree.map(
            lambda v, w: as_seen(v, case.layers) - as_seen(w, case.layers), w_adv, params
        )
        rise = adversarial_loss - loss
        return rise, inner(realised, intended), inner(realised, realised), inner(intended, intended)

    rise, both, realised, intended = (float(x) for x in step(params, batch))
    return {
        "length": realised**0.5 / rho,
        "cosine": both / (realised * intended) ** 0.5 if realised else 0.0,
        "rise_of_loss": rise,
    }


def measure(size: str, rho: float) -> list[dict]:
    """Measure every case at one size."""
    batch = make_batch(SIZES[size].vocab_size, BATCH, INPUTS, TARGETS)
    tokens = jnp.ones((1, 2), jnp.int32)
    wide = jax.jit(T5(SIZES[size]).init)(jax.random.key(0), tokens, tokens)["params"]
    rows = []
    for case in CASES:
        model = T5(dataclasses.replace(SIZES[size], dtype=case.layers))
        about = {"size": size, "parameters": count_parameters(wide), "rho": rho}
        about |= case._asdict() | {"adversarial_dtype": case.adversarial_dtype or "default"}
        rows.append(about | compare(model, prepare(wide, case), batch, rho, case))
        print(as_row(rows[-1]), flush=True)
    return rows


def train(optimizer: optax.GradientTransformation, rho: float) -> list[dict]:
    """Return the rise of the loss on the way, as layers in bfloat16 and in float32 see it."""
    case = Case("float32", layers="bfloat16", checkpoint="bfloat16")
    config = SIZES["1M"]
    batch = make_batch(config.vocab_size, BATCH, INPUTS, TARGETS)
    tokens = jnp.ones((1, 2), jnp.int32)
    params = prepare(T5(config).init(jax.random.key(0), tokens, tokens)["params"], case)
    state = optimizer.init(params)

    def gradient(layers: str) -> Any:
        loss_fn = make_loss_fn(T5(dataclasses.replace(config, dtype=layers)))
        return jax.jit(sam_optax.value_and_grad(loss_fn, rho, 1.0, has_aux=True, return_info=True))

    def rise(info: sam_optax.SharpnessInfo) -> float:
        return float(info.descent_loss - info.ascent_loss)

    update, narrow, wide = jax.jit(optimizer.update), gradient(case.layers), gradient("float32")
    rows = []
    for step in range(STEPS[-1] + 1):
        _, grads, info = narrow(params, batch)
        if step in STEPS:
            in_float32 = rise(wide(params, batch)[2])
            rows.append({"step": step, "rise_of_loss": rise(info), "in_float32": in_float32})
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return rows


HEAD = """\
| T5.1.1 | rho | parameters | `adversarial_dtype` | layers | length / rho | cosine | rise of loss |
|---|---|---|---|---|---|---|---|"""


def as_row(row: dict) -> str:
    """One line of the table."""
    of = f" of a checkpoint in {row['checkpoint']}" if row["checkpoint"] else ""
    return (
        f"| {row['size']}, {row['parameters'] / 1e6:.0f}M | {row['rho']:g} "
        f"| {row['parameter_dtype']}{of} | {row['adversarial_dtype']} | {row['layers']} "
        f"| {row['length']:.3f} | {row['cosine']:.3f} | {row['rise_of_loss']:.4f} |"
    )


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["small"], choices=SIZES)
    parser.add_argument("--rho", type=float, default=0.15)
    parser.add_argument("--training_rho", type=float, default=0.02)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(HEAD)
    rows = [row for size in args.sizes for row in measure(size, args.rho)]
    training = {}
    for name, optimizer in OPTIMIZERS.items():
        training[name] = train(optimizer, args.training_rho)
        shares = (f"{x['step']}: {x['rise_of_loss'] / x['in_float32']:.2f}" for x in training[name])
        print(f"{name}, share of the rise in float32 after steps: {', '.join(shares)}", flush=True)
    of_training = {"rho": args.training_rho, "optimizers": training}
    results = {"one_step": rows, "training": of_training}
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
