"""Does SAM help an image classifier? Scikit-learn's digits with and without it, over twenty seeds.

    python digits.py                    # a fifth of the training labels are wrong
    python digits.py --label-noise 0    # all of them are right

Each seed draws its own training and test images, wrong labels, weights and batches, and trains on
them with each method, so that the methods are compared in pairs.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sam_optax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rho", type=float, default=0.2)
parser.add_argument("--label-noise", type=float, default=0.2, help="share of wrong labels")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--seeds", type=int, default=20)
parser.add_argument("--first-seed", type=int, default=0)
parser.add_argument("--validation", action="store_true", help="measure on the validation images")
args = parser.parse_args()
if args.steps < 2:
    parser.error(f"--steps {args.steps}: give 2 or more, so that half of them are some")
if args.seeds < 2:
    parser.error(f"--seeds {args.seeds}: a standard error takes 2 or more")
if args.first_seed < 0:
    parser.error(f"--first-seed {args.first_seed}: give 0 or more")
if not 0 <= args.label_noise <= 1:
    parser.error(f"--label-noise {args.label_noise}: a share is between 0 and 1")


def data(seed):
    """Return 500 training images with their labels, and 1,000 to test on or 297 to validate on."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    train, validation, test = np.split(rng.permutation(len(labels)), [500, 797])
    held_out = validation if args.validation else test
    train_labels = labels[train]
    wrong = rng.permutation(500)[: round(500 * args.label_noise)]
    train_labels[wrong] = (train_labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return images[train], train_labels, images[held_out], labels[held_out]


def init(key):
    shapes = {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "dense": (512, 64), "out": (64, 10)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    kernel = jax.nn.initializers.he_normal()
    return {name: (kernel(keys[name], s), jnp.zeros(s[-1])) for name, s in shapes.items()}


def conv(x, layer, stride):
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, layer[0], (stride, stride), "SAME", dimension_numbers=dims)
    return jax.nn.relu(x + layer[1])


@jax.jit
def classify(params, images):
    x = conv(conv(images, params["conv1"], stride=1), params["conv2"], stride=2)
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"][0] + params["dense"][1])
    return x @ params["out"][0] + params["out"][1]


def loss_fn(params, images, labels):
    logits = classify(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracies(rho, steps):
    """Train once a seed, and return the shares of held-out images classified correctly, in %."""
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(optax.cosine_decay_schedule(0.02, steps), momentum=0.9),
    )
    # This line is SAM's. With rho=0 it is jax.value_and_grad, bit for bit.
    loss_and_grad = sam_optax.value_and_grad(loss_fn, rho=rho, batch_argnums=(1, 2))

    @jax.jit
    def train_step(params, state, images, labels):
        loss, grads = loss_and_grad(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    percentages = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        images, labels, test_images, test_labels = data(seed)
        params = init(jax.random.key(seed))
        state = optimizer.init(params)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            batch = rng.choice(len(images), 64, replace=False)
            params, state, _ = train_step(params, state, images[batch], labels[batch])
        correct = classify(params, test_images).argmax(-1) == test_labels
        percentages.append(100 * float(correct.mean()))
    return np.array(percentages)


def mean_and_error(values):
    """Return the mean over seeds and its standard error."""
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


held_out = "validation" if args.validation else "test"
print(
    f"{held_out} accuracy in %, mean ± standard error of {args.seeds} seeds; SAM's gain, in pairs"
)
sam = accuracies(args.rho, args.steps)
print(f"SAM, rho={args.rho}, {args.steps} steps: {mean_and_error(sam)}")
# Where labels are wrong, stopping early helps plain training too. And a SAM step costs 1.25 plain
# ones, so plain training may have as many more.
for steps in (args.steps // 2, args.steps, args.steps * 5 // 4):
    plain = accuracies(0, steps)
    print(f"plain, {steps} steps: {mean_and_error(plain)}; gain {mean_and_error(sam - plain)}")
