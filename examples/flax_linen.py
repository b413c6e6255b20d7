"""SAM with a Flax Linen `TrainState`: dropout, batch statistics and all.

python flax_linen.py
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training import train_state
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


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(nn.Dense(128)(x))
        x = nn.Dropout(0.1, deterministic=not training)(nn.relu(x))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: dict


def make_train_step(rho):
    @jax.jit
    def train_step(state, batch, dropout_key):
        def loss_fn(params, batch, dropout_key):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                training=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), new["batch_stats"]

        # Was jax.value_and_grad(loss_fn, has_aux=True). The key is the same in both passes, and
        # the batch statistics come from the descent pass, on the whole batch.
        gradient = sam_optax.value_and_grad(loss_fn, rho=rho, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params, batch, dropout_key)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    return train_step


for name, rho in (("plain", 0.0), ("SAM", 0.1)):
    model = Classifier()
    variables = model.init(jax.random.key(0), images[:1], training=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adamw(2e-3),
    )
    train_step = make_train_step(rho)
    rng = np.random.default_rng(0)
    losses = []
    for step in range(args.steps):
        i = rng.choice(1000, 64, replace=False)
        batch = {"image": images[i], "label": labels[i]}
        state, loss = train_step(state, batch, jax.random.key(step))
        losses.append(float(loss))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = model.apply(variables, images[test], training=False)
    print(
        f"{name}: training loss {losses[0]:.3f} in step 1, {np.mean(losses[-10:]):.3f} in the last "
        f"10 of {state.step}; test accuracy {100 * (logits.argmax(-1) == labels[test]).mean():.1f}%"
    )
