"""SAM for fine-tuning a language model: in the space of LoRA adapters, or through the norms alone.

    python lora.py
    python lora.py --perturb all    # all weights move to the adversarial point, not the norms alone

A small character model is trained on Python's documentation, then fine-tuned on a little Python
code. All of the text comes with Python.
"""

import argparse
import inspect
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sam_optax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pretraining-steps", type=int, default=800)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--perturb", choices=["norms", "all"], default="norms")
args = parser.parse_args()
if min(args.steps, args.pretraining_steps) < 1:
    parser.error("--steps and --pretraining-steps: give 1 or more")
WIDTH, CONTEXT, RANK = 32, 16, 4
MATRICES = {"qkv": (1, 3), "attention_out": (1, 1), "mlp_in": (1, 4), "mlp_out": (4, 1)}


def norm(x, scale):
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


@jax.jit
def loss_fn(params, tokens):
    """Return the cross entropy of the next character, in nats, of a transformer of one block."""
    x = params["embed"][tokens[:, :-1]] + params["position"]
    qkv = norm(x, params["attention_norm"]) @ params["qkv"]
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 4, -1), 3, axis=-1)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x += mixed.reshape(x.shape) @ params["attention_out"]
    x += jax.nn.gelu(norm(x, params["mlp_norm"]) @ params["mlp_in"]) @ params["mlp_out"]
    logits = norm(x, params["final_norm"]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def lora_loss_fn(adapters, tokens, base):
    tuned = {name: base[name] + a["in"] @ a["out"] for name, a in adapters.items()}
    return loss_fn(base | tuned, tokens)


def normal(key, *shape):
    return jax.random.normal(key, shape) * shape[0] ** -0.5


def examples(text, rng, size):
    text = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    start = rng.integers(0, len(text) - CONTEXT, (size, 1))
    return text[start + np.arange(CONTEXT + 1)].astype(np.int32)


optimizer = optax.adam(5e-3)


def make_train_step(loss_fn, perturb=None):
    @jax.jit
    def train_step(params, state, tokens, rho, *base):
        # rho is an argument, so one compiled step serves every rho, and 0: plain training.
        gradient = sam_optax.value_and_grad(loss_fn, rho=rho, perturb=perturb)
        _, grads = gradient(params, tokens, *base)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return train_step


def train(train_step, params, text, steps, rho, *base):
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = train_step(params, state, examples(text, rng, 16), rho, *base)
    return params


keys = jax.random.split(jax.random.key(0), 6)
base = {name: jnp.ones(WIDTH) for name in ("attention_norm", "mlp_norm", "final_norm")}
base |= {"embed": normal(keys[0], 128, WIDTH), "position": normal(keys[1], CONTEXT, WIDTH)}
adapters = {}
for key, (name, (i, o)) in zip(keys[2:], MATRICES.items(), strict=True):
    base[name] = normal(key, i * WIDTH, o * WIDTH)
    a = normal(jax.random.fold_in(key, 1), i * WIDTH, RANK)
    adapters[name] = {"in": a, "out": jnp.zeros((RANK, o * WIDTH))}

code = inspect.getsource(argparse)
little_code, test_code = code[:8000], code[8000:]
test = examples(test_code, np.random.default_rng(1), 1000)
documentation = " ".join(topics[name] for name in sorted(topics))

# LoRA: the adapters are the parameters. The base model is an extra argument, which is neither
# trained, nor perturbed, nor copied.
lora_step = make_train_step(lora_loss_fn)
# All weights are trained, but only the norms' scales move to the adversarial point, so the step
# needs no second copy of the others.
only_norms = None if args.perturb == "all" else lambda path: path.endswith("norm")
step = make_train_step(loss_fn, perturb=only_norms)

base = train(step, base, documentation, args.pretraining_steps, 0.0)
print(f"loss on other code before fine-tuning: {loss_fn(base, test):.3f}, and after:")
print(f"rho   LoRA    all weights, {args.perturb} perturbed")
for rho in (0.0, 0.3):
    adapted = train(lora_step, adapters, little_code, args.steps, rho, base)
    tuned = train(step, base, little_code, args.steps, rho)
    print(f"{rho:.1f}   {lora_loss_fn(adapted, test, base):.3f}   {loss_fn(tuned, test):.3f}")
