"""Greedy decoding: the most likely next token, until every sequence has ended."""

import jax
import jax.numpy as jnp

from finetune.model import PAD_ID, T5

EOS_ID = 1


def make_greedy_decode(model: T5, max_length: int):
    """Builds the jitted `decode(params, input_tokens) -> [batch, max_length] tokens`.

    Rows are padded after their end token. Each step runs the decoder over the whole (short) buffer
    again: causality makes that the same as a key-value cache, and for the dozen positions here it
    is cheap beside a training step.
    """

    def decode(params, input_tokens):
        variables = {"params": params}
        encoded = model.apply(variables, input_tokens, method=T5.encode)
        batch_size = input_tokens.shape[0]

        def unfinished(state):
            position, _, ended = state
            return (position < max_length) & ~jnp.all(ended)

        def next_token(state):
            position, tokens, ended = state  # tokens[:, 0] is the start token
            decoder_tokens = tokens[:, :max_length]
            logits = model.apply(variables, encoded, input_tokens, decoder_tokens, method=T5.decode)
            best = jnp.argmax(logits[:, position], axis=-1).astype(tokens.dtype)
            best = jnp.where(ended, PAD_ID, best)
            return position + 1, tokens.at[:, position + 1].set(best), ended | (best == EOS_ID)

        start = jnp.full((batch_size, max_length + 1), PAD_ID, jnp.int32)
        # A row of padding (of a padded batch) has nothing to decode.
        ended = jnp.all(input_tokens == PAD_ID, axis=-1)
        return jax.lax.while_loop(unfinished, next_token, (0, start, ended))[1][:, 1:]

    return jax.jit(decode)
