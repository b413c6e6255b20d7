"""SAM with Flax NNX: an `nnx.Optimizer`, and a model with dropout and batch statistics.

python flax_nnx.py
"""

import argparse

import numpy as np
import optax
from flax import nnx
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


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def make_train_step(rho):
    @nnx.jit
    def train_step(model, optimizer, batch):
        # SAM calls the loss twice, so it is a function of arrays: the parameters, and the rest
        # (batch statistics, counters of the dropout masks), which goes in and comes out as aux.
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch, rest):
            model = nnx.merge(graph, params, rest, copy=True)  # to be changed in here
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model(batch["image"]), batch["label"]
            )
            return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

        gradient = sam_optax.value_and_grad(loss_fn, rho=rho, has_aux=True)
        (loss, rest), grads = gradient(params, batch, rest)
        nnx.update(model, rest)
        optimizer.update(model, grads)
        return loss

    return train_step


for name, rho in (("plain", 0.0), ("SAM", 0.1)):
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    train_step = make_train_step(rho)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(args.steps):
        i = rng.choice(1000, 64, replace=False)
        losses.append(float(train_step(model, optimizer, {"image": images[i], "label": labels[i]})))
    model.eval()
    accuracy = 100 * (model(images[test]).argmax(-1) == labels[test]).mean()
    print(
        f"{name}: training loss {losses[0]:.3f} in step 1, {np.mean(losses[-10:]):.3f} in the last "
        f"10 of {optimizer.step[...]}; test accuracy {accuracy:.1f}%"
    )
