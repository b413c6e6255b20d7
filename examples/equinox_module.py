"""SAM with an Equinox module.

python equinox_module.py
"""

import argparse

import equinox as eqx
import jax
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
optimizer = optax.adamw(2e-3)


def make_train_step(rho):
    @eqx.filter_jit
    def train_step(model, state, batch):
        # A module holds more than parameters (here, its activation functions), so the gradient is
        # taken for the arrays: eqx.filter_value_and_grad in two lines.
        params, rest = eqx.partition(model, eqx.is_inexact_array)

        def loss_fn(params, batch):
            logits = jax.vmap(eqx.combine(params, rest))(batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        loss, grads = sam_optax.value_and_grad(loss_fn, rho=rho)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    return train_step


for name, rho in (("plain", 0.0), ("SAM", 0.1)):
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    train_step = make_train_step(rho)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(args.steps):
        i = rng.choice(1000, 64, replace=False)
        batch = {"image": images[i], "label": labels[i]}
        model, state, loss = train_step(model, state, batch)
        losses.append(float(loss))
    logits = jax.vmap(model)(images[test])
    print(
        f"{name}: training loss {losses[0]:.3f} in step 1, {np.mean(losses[-10:]):.3f} in the last "
        f"10 of {args.steps}; test accuracy {100 * (logits.argmax(-1) == labels[test]).mean():.1f}%"
    )
