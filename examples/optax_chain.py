"""SAM around an `optax.chain`, in a plain JAX loop, with its diagnostics.

python optax_chain.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sam_optax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()
if args.steps < 1:
    parser.error(f"--steps {args.steps}: give 1 or more")

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train, test = slice(0, 1000), slice(1000, None)


def logits(params, x):
    return jax.nn.relu(x @ params["in"] + params["bias"]) @ params["out"]


def loss_fn(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch["image"]), batch["label"]
    )
    return losses.mean()


# What acts on the gradient goes inside, so that it acts on SAM's gradient.
tx = sam_optax.sharpness_aware(
    optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)),
    ),
    rho=0.1,
)


@jax.jit
def train_step(params, state, batch):
    updates, state, info = tx.update(
        None,  # no gradient yet: SAM takes its two itself
        state,
        params,
        grad_fn=jax.value_and_grad(loss_fn),
        batch=batch,
        return_info=True,
    )
    return optax.apply_updates(params, updates), state, info


keys = jax.random.split(jax.random.key(0), 2)
params = {
    "in": jax.random.normal(keys[0], (64, 128)) / 8,
    "bias": jnp.zeros(128),
    "out": jax.random.normal(keys[1], (128, 10)) / 12,
}
state = tx.init(params)
rng = np.random.default_rng(0)

print("step   ascent loss   descent loss   cosine   length / rho   skipped")
for step in range(args.steps):
    i = rng.choice(1000, 64, replace=False)
    params, state, info = train_step(params, state, {"image": images[i], "label": labels[i]})
    if step % 50 == 0 or step == args.steps - 1:
        print(
            f"{step:4}   {info.ascent_loss:11.3f}   {info.descent_loss:12.3f}   {info.cosine:6.2f}"
            f"   {info.realised_perturbation:12.3f}   {info.skipped_ascents:7}"
        )

correct = logits(params, images[test]).argmax(-1) == labels[test]
print(f"test accuracy {100 * correct.mean():.1f}%")
