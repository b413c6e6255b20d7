"""The training loss: cross entropy of each target token, averaged over the weighted ones."""

import jax
import jax.numpy as jnp

from finetune.model import T5


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array):
    """Returns (mean cross entropy in nats, sum of weights)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    total = jnp.sum(weights)
    # A batch of nothing but padding has loss 0, not 0/0.
    return -jnp.sum(picked * weights) / jnp.maximum(total, 1.0), total


def make_loss_fn(model: T5):
    """Builds `loss_fn(params, batch, dropout_key) -> (loss, aux)`.

    `batch` is a model batch of SeqIO's `EncDecFeatureConverter`; `dropout_key=None` turns dropout
    off. `aux` holds the number of target tokens, for averaging over batches.
    """

    def loss_fn(params, batch, dropout_key=None):
        logits = model.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        loss, num_tokens = cross_entropy(
            logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        )
        return loss, {"num_tokens": num_tokens}

    return loss_fn
