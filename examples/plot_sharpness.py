"""How flat is the minimum? Train a small network with and without SAM and draw what is around it.

    python plot_sharpness.py                  # writes sharpness.png
    python plot_sharpness.py --rho 0.05 --output flatter.svg

One function draws each measure of `sam_optax.sharpness`, on Matplotlib axes of yours.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # there may be no display

import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import sam_optax
from sam_optax import sharpness

COLOURS = {"plain": "#b5482a", "SAM": "#1f6f8b"}


def draw_eigenvalues(axis, eigenpairs):
    """Draw the largest Hessian eigenvalues; `eigenpairs` are `hessian_eigenpairs` by name."""
    for name, pairs in eigenpairs.items():
        rank = np.arange(1, len(pairs.values) + 1)
        axis.semilogy(rank, pairs.values, "o-", color=COLOURS.get(name), label=name)
    axis.set(title="Largest Hessian eigenvalues", xlabel="rank", ylabel="eigenvalue")
    axis.legend(frameon=False)


def draw_epsilon_sharpness(axis, rises):
    """Draw the loss's largest rise against the distance; `rises` has `{rho: rise}` by name."""
    for name, by_rho in rises.items():
        axis.loglog(*zip(*by_rho.items(), strict=True), "o-", color=COLOURS.get(name), label=name)
    axis.set(title="Epsilon-sharpness", xlabel="distance rho", ylabel="largest rise of the loss")
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.legend(frameon=False)


def draw_loss_along(axis, distances, losses, direction):
    """Draw the loss along a direction; `losses` has `loss_along`'s result by name."""
    for name, values in losses.items():
        axis.plot(distances, values, color=COLOURS.get(name), label=name)
    axis.set(title=f"Along {direction}", xlabel="distance", ylabel="training loss")
    axis.legend(frameon=False)


def draw_loss_across(axis, distances, losses, name, levels):
    """Draw contours of the loss over a plane: the result of `loss_along` with `across`."""
    contours = axis.contour(distances, distances, losses.T, levels=levels, cmap="viridis")
    axis.clabel(contours, fontsize=7, fmt="%.2g")
    axis.plot(0, 0, "+", color="black")
    axis.set(title=f"{name}: a plane", xlabel="top eigenvector", ylabel="second eigenvector")
    axis.set_aspect("equal")


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["images"] @ params["in"])
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def train(data, rho, steps):
    """Return the parameters after so many steps; with `rho=0` without SAM."""
    tx = sam_optax.sharpness_aware(optax.sgd(0.05, momentum=0.9), rho=rho)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": jax.random.normal(keys[0], (64, 64)) / 8,
        "out": jax.random.normal(keys[1], (64, 10)) / 8,
    }

    @jax.jit
    def train_step(params, state, batch):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(loss_fn), batch=batch)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(data["labels"]), 64, replace=False)
        batch = {name: values[chosen] for name, values in data.items()}
        params, state = train_step(params, state, batch)
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rho", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--points", type=int, default=21, help="on each side of a plane")
    parser.add_argument("--output", type=Path, default=Path("sharpness.png"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give 1 or more")
    if args.points < 2:
        parser.error(f"--points {args.points}: a plane takes 2 or more on each side")
    formats = Figure().canvas.get_supported_filetypes()
    if args.output.suffix.removeprefix(".") not in formats:
        parser.error(f"--output {args.output}: give one of .{', .'.join(sorted(formats))}")
    images, labels = load_digits(return_X_y=True)
    data = {"images": images.astype(np.float32) / 16, "labels": labels}
    solutions = {"plain": train(data, 0.0, args.steps), "SAM": train(data, args.rho, args.steps)}

    # The whole training set of 1,797, in batches of one size: any number of them, sharded or not.
    batches = [{name: values[i : i + 599] for name, values in data.items()} for i in (0, 599, 1198)]
    top = {
        name: sharpness.hessian_eigenpairs(loss_fn, params, batches, k=5)
        for name, params in solutions.items()
    }
    rises = {
        name: {
            rho: sharpness.epsilon_sharpness(loss_fn, params, batches, rho=rho).rise
            for rho in (0.05, 0.1, 0.2, 0.4, 0.8)
        }
        for name, params in solutions.items()
    }
    line, plane = np.linspace(-2, 2, 41), np.linspace(-2, 2, args.points)
    along = {
        name: sharpness.loss_along(loss_fn, params, batches, top[name].vectors[0], line)
        for name, params in solutions.items()
    }
    across = {
        name: sharpness.loss_along(
            loss_fn, params, batches, top[name].vectors[0], plane, across=top[name].vectors[1]
        )
        for name, params in solutions.items()
    }

    figure, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(11, 7.5), layout="constrained")
    draw_eigenvalues(axes["A"], top)
    draw_epsilon_sharpness(axes["B"], rises)
    draw_loss_along(axes["C"], line, along, "the top eigenvector")
    levels = np.geomspace(0.01, 1, 8)  # the same for both, so that they can be compared
    draw_loss_across(axes["D"], plane, across["plain"], "plain", levels)
    draw_loss_across(axes["E"], plane, across["SAM"], "SAM", levels)
    figure.savefig(args.output, dpi=100)
    for name, pairs in top.items():
        print(
            f"{name}: top eigenvalue {pairs.values[0]:.3g}, rise within 0.2: {rises[name][0.2]:.3g}"
        )
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
