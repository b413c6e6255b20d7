import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune import model
from finetune.decode import EOS_ID, make_greedy_decode

CONFIG = model.T5Config(
    vocab_size=12,
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=24,
    num_encoder_layers=1,
    num_decoder_layers=2,
)
LENGTH = 9


@pytest.fixture(scope="module")
def decoded():
    tokens = jnp.ones((1, 3), jnp.int32)
    params = jax.jit(model.T5(CONFIG).init)(jax.random.key(0), tokens, tokens)["params"]
    # A fresh model repeats itself: wider relative biases and embeddings make its outputs vary.
    params = jax.tree.map(lambda w: 3 * w, params)
    inputs = jax.random.randint(jax.random.key(1), (40, 6), 2, CONFIG.vocab_size)
    inputs = inputs.at[-1].set(model.PAD_ID)
    return params, inputs, make_greedy_decode(model.T5(CONFIG), LENGTH)(params, inputs)


def test_each_token_is_the_argmax_of_teacher_forced_logits(decoded):
    params, inputs, outputs = decoded
    before = jnp.pad(outputs, ((0, 0), (1, 0)), constant_values=model.PAD_ID)[:, :-1]
    logits = jax.jit(model.T5(CONFIG).apply)({"params": params}, inputs, before)
    ended = np.cumsum(np.asarray(outputs) == EOS_ID, axis=1) - (np.asarray(outputs) == EOS_ID) > 0
    ended[-1] = True
    best = np.where(ended, model.PAD_ID, jnp.argmax(logits, -1))
    np.testing.assert_array_equal(outputs, best)


def test_outputs_end_at_various_places_and_are_padded_after(decoded):
    rows = np.asarray(decoded[2])[:-1]
    lengths = {row.tolist().index(EOS_ID) if EOS_ID in row else LENGTH for row in rows}
    assert len(lengths) > 1, "the test above would not see an end token"
    for row in rows.tolist():
        if EOS_ID in row:
            assert set(row[row.index(EOS_ID) + 1 :]) <= {model.PAD_ID}


def test_a_row_of_padding_decodes_to_padding(decoded):
    assert not np.asarray(decoded[2])[-1].any()
