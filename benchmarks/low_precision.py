"""How much of the perturbation survives in low-precision parameters, on T5.1.1 at its real sizes.

  JAX_PLATFORMS=cpu python benchmarks/low_precision.py --sizes small

SAM's perturbation has the length rho, spread over all parameters: each moves by far less than the
256th of its size that bfloat16 resolves. For parameters in several dtypes, and w_adv in
the library's default dtype or in the parameters' own, this compares the realised perturbation
w_adv - w with the intended one: their lengths, the cosine between them, and how much they raise the
loss. Weights are at T5's initialisation, tokens are random: the gradient is a real model's, and its
direction does not matter here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

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
CASES = [
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "bfloat16"),
    ("float16", None),
    ("float16", "float16"),
    ("float32", "bfloat16"),
]
BATCH, INPUTS, TARGETS = 8, 32, 8


def inner(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees."""
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))


def compare(model: T5, params: Any, batch: Any, rho: float, adversarial_dtype: Any) -> dict:
    """Return what becomes of the perturbation of one step."""
    loss_fn = make_loss_fn(model)

    def with_point(params, batch):
        return loss_fn(params, batch)[0], params

    @jax.jit
    def step(params, batch):
        gradient = sam_optax.value_and_grad(
            with_point, rho, 1.0, has_aux=True, adversarial_dtype=adversarial_dtype
        )
        (adversarial_loss, w_adv), _ = gradient(params, batch)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        intended = sam_optax.gradient_perturbation(grads, params, rho)
        realised = jax.tree.map(
            lambda v, w: v.astype(jnp.float32) - w.astype(jnp.float32), w_adv, params
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
    model = T5(SIZES[size])
    batch = make_batch(SIZES[size].vocab_size, BATCH, INPUTS, TARGETS)
    tokens = jnp.ones((1, 2), jnp.int32)
    wide = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
    rows = []
    for dtype, adversarial_dtype in CASES:
        params = jax.tree.map(lambda w, dtype=dtype: w.astype(dtype), wide)
        case = {
            "size": size,
            "parameters": count_parameters(wide),
            "rho": rho,
            "parameter_dtype": dtype,
            "adversarial_dtype": adversarial_dtype or "default",
        }
        rows.append(case | compare(model, params, batch, rho, adversarial_dtype))
        print(as_row(rows[-1]), flush=True)
    return rows


HEAD = """\
| T5.1.1 | rho | parameters | `adversarial_dtype` | length / rho | cosine | rise of the loss |
|---|---|---|---|---|---|---|"""


def as_row(row: dict) -> str:
    """One line of the table."""
    return (
        f"| {row['size']}, {row['parameters'] / 1e6:.0f}M | {row['rho']:g} "
        f"| {row['parameter_dtype']} | {row['adversarial_dtype']} | {row['length']:.3f} "
        f"| {row['cosine']:.3f} | {row['rise_of_loss']:.4f} |"
    )


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["small"], choices=SIZES)
    parser.add_argument("--rho", type=float, default=0.15)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(HEAD)
    rows = [row for size in args.sizes for row in measure(size, args.rho)]
    args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
