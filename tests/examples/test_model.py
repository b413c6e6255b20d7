import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune import model
from finetune.loss import cross_entropy, make_loss_fn
from flax import linen as nn

CONFIG = model.T5Config(
    vocab_size=50,
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.2,
)


@pytest.fixture(scope="module")
def params():
    return _init(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def _init(config):
    tokens = jnp.ones((1, 3), jnp.int32)
    return model.T5(config).init(jax.random.key(0), tokens, tokens)["params"]


def _shapes(config):
    return jax.eval_shape(lambda: _init(config))


def _tokens(seed, shape=(3, 7)):
    return jax.random.randint(jax.random.key(seed), shape, 3, CONFIG.vocab_size)


@jax.jit
def _logits(params, inputs, decoder_inputs):
    return model.T5(CONFIG).apply({"params": params}, inputs, decoder_inputs)


@pytest.mark.parametrize(
    ("size", "published"),
    [(model.t5_1_1_small, 76_961_152), (model.t5_1_1_base, 247_577_856)],
)
def test_public_sizes_have_the_published_number_of_parameters(size, published):
    assert model.count_parameters(_shapes(size())) == published


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "size", [model.t5_1_1_small, model.t5_1_1_base, model.t5_1_1_large, model.t5_1_1_xl]
)
def test_parameter_count_follows_the_architecture(size):
    c = size()
    attention = 4 * c.d_model * c.num_heads * c.head_dim
    mlp = 3 * c.d_model * c.d_ff
    encoder = c.num_encoder_layers * (attention + mlp + 2 * c.d_model)
    decoder = c.num_decoder_layers * (2 * attention + mlp + 3 * c.d_model)
    each_stack = c.relative_position_buckets * c.num_heads + c.d_model
    expected = 2 * c.vocab_size * c.d_model + encoder + decoder + 2 * each_stack
    assert model.count_parameters(_shapes(c)) == expected


def test_there_is_no_bias_vector_and_only_norms_have_vectors(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert name.endswith(("['kernel']", "['embedding']", "['scale']")), name
        assert leaf.ndim > 1 or "norm" in name


def test_output_logits_do_not_share_the_input_embedding(params):
    shifted = {**params, "logits": {"kernel": params["logits"]["kernel"] + 1.0}}
    inputs, decoder_inputs = _tokens(1), _tokens(2)
    encoded = [
        model.T5(CONFIG).apply({"params": p}, inputs, method=model.T5.encode)
        for p in (params, shifted)
    ]
    np.testing.assert_array_equal(*encoded)
    assert not np.allclose(
        _logits(params, inputs, decoder_inputs), _logits(shifted, inputs, decoder_inputs)
    )


def test_relative_position_tables_are_one_for_each_stack(params):
    tables = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        if "relative_bias" in jax.tree_util.keystr(path)
    ]
    assert tables == [
        f"['{stack}']['relative_bias']['embedding']" for stack in ("decoder", "encoder")
    ]


# 32 buckets up to distance 128. Both ways: 8 exact ones each, then 8 + floor(2 log2(d / 8)).
@pytest.mark.parametrize(
    ("position", "bucket"),
    [
        (0, 0),
        (-1, 1),
        (-7, 7),
        (-8, 8),
        (-11, 8),
        (-12, 9),
        (-15, 9),
        (-16, 10),
        (-32, 12),
        (-64, 14),
        (-127, 15),
        (-128, 15),
        (-999, 15),
        (1, 17),
        (7, 23),
        (16, 26),
        (999, 31),
    ],
)
def test_bidirectional_buckets(position, bucket):
    assert model.relative_position_bucket(np.array([position]), True, 32, 128) == bucket


# Unidirectional: 16 exact ones, then 16 + floor(16 log(d / 16) / log(8)); the future is bucket 0.
@pytest.mark.parametrize(
    ("position", "bucket"),
    [
        (5, 0),
        (0, 0),
        (-1, 1),
        (-15, 15),
        (-16, 16),
        (-18, 16),
        (-19, 17),
        (-32, 21),
        (-64, 26),
        (-127, 31),
        (-128, 31),
        (-999, 31),
    ],
)
def test_unidirectional_buckets(position, bucket):
    assert model.relative_position_bucket(np.array([position]), False, 32, 128) == bucket


@pytest.mark.one_in(5)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 1), (12, 12), (5, 40), (40, 5)])
def test_bias_is_the_tables_row_for_the_distance(queries, keys, bidirectional):
    config = model.T5Config(num_heads=3, relative_position_max_distance=20)
    bias = model.RelativePositionBias(config, bidirectional)
    table = jax.random.normal(jax.random.key(0), (config.relative_position_buckets, 3))
    found = bias.apply({"params": {"embedding": table}}, queries, keys)
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    rows = model.relative_position_bucket(distance, bidirectional, 32, 20)
    np.testing.assert_array_equal(found, table[rows].transpose(2, 0, 1)[None])


def test_decoder_sees_no_later_token(params):
    inputs, decoder_inputs = _tokens(1), _tokens(2)
    changed = decoder_inputs.at[:, 4].set((decoder_inputs[:, 4] + 1) % CONFIG.vocab_size)
    before, after = (_logits(params, inputs, d) for d in (decoder_inputs, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_encoder_sees_both_directions(params):
    inputs = _tokens(1)
    changed = inputs.at[:, -1].set(inputs[:, -1] % 40 + 5)
    encode = lambda x: model.T5(CONFIG).apply({"params": params}, x, method=model.T5.encode)  # noqa: E731
    assert not np.allclose(encode(inputs)[:, 0], encode(changed)[:, 0])


def test_padding_of_inputs_has_no_influence(params):
    inputs, decoder_inputs = _tokens(1), _tokens(2)
    padded = jnp.pad(inputs, ((0, 0), (0, 5)), constant_values=model.PAD_ID)
    np.testing.assert_allclose(
        _logits(params, inputs, decoder_inputs),
        _logits(params, padded, decoder_inputs),
        rtol=1e-5,
        atol=1e-5,
    )


def test_feed_forward_is_gated_gelu():
    layer = model.GatedGelu(CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 3, CONFIG.d_model))
    params = layer.init(jax.random.key(1), x, True)["params"]
    weights = {name: np.asarray(params[name]["kernel"], np.float64) for name in params}
    gate, linear = (np.asarray(x, np.float64) @ weights[name] for name in ("wi_0", "wi_1"))
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    expected = (gelu * linear) @ weights["wo"]
    np.testing.assert_allclose(layer.apply({"params": params}, x, True), expected, atol=1e-5)


def test_norm_divides_by_the_root_mean_square_and_keeps_the_mean():
    x = jnp.array([[3.0, 4.0, 0.0, 0.0]])
    norm = model.RMSNorm("float32")
    y = norm.apply({"params": {"scale": jnp.array([1.0, 2.0, 1.0, 1.0])}}, x)
    np.testing.assert_allclose(y, [[3 / 2.5, 2 * 4 / 2.5, 0, 0]], rtol=1e-6)


def test_attention_scores_are_not_scaled():
    attention = model.Attention(CONFIG)
    x = jax.random.normal(jax.random.key(0), (1, 4, CONFIG.d_model))
    mask = np.ones((1, 1, 1, 4), bool)
    params = attention.init(jax.random.key(1), x, x, mask, None, True)["params"]
    q, k, v = (
        np.einsum("bld,dhk->blhk", x, params[n]["kernel"]) for n in ("query", "key", "value")
    )
    weights = jax.nn.softmax(np.einsum("bqhk,bmhk->bhqm", q, k))
    expected = np.einsum("bhqm,bmhk,hkd->bqd", weights, v, params["out"]["kernel"])
    actual = attention.apply({"params": params}, x, x, mask, None, True)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    # The initialiser carries the scale instead: 1/sqrt(embed * head_dim) against 1/sqrt(embed).
    wide = model.Attention(model.T5Config(d_model=256, num_heads=4, head_dim=64))
    x = jnp.ones((1, 4, 256))
    params = wide.init(jax.random.key(1), x, x, mask, None, True)["params"]
    assert np.std(params["query"]["kernel"]) == pytest.approx((256 * 64) ** -0.5, rel=0.05)
    assert np.std(params["key"]["kernel"]) == pytest.approx(256**-0.5, rel=0.05)


def test_bfloat16_activations_leave_parameters_and_logits_in_float32():
    config = model.T5Config(**{**vars(CONFIG), "dtype": "bfloat16"})
    params = _init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    variables = {"params": params}
    encoded = model.T5(config).apply(variables, _tokens(1), method=model.T5.encode)
    logits = model.T5(config).apply(variables, _tokens(1), _tokens(2))
    assert (encoded.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(logits, _logits(params, _tokens(1), _tokens(2)), atol=0.3)


def test_scanned_layers_are_the_same_model(params):
    scanned = dataclasses.replace(CONFIG, scan_layers=True)

    def stacked(tree):
        """The same numbers as `scanned` has them: each stack's layers in one array."""
        layers = [tree[f"layer_{i}"] for i in range(2)]
        rest = {name: tree[name] for name in tree if not name.startswith("layer_")}
        return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    def both_stacked(tree):
        return tree | {name: stacked(tree[name]) for name in ("encoder", "decoder")}

    inputs, targets = _tokens(1), _tokens(2)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(config, params):
        def loss_fn(params):
            logits = model.T5(config).apply({"params": params}, inputs, targets)
            return jnp.sum(jnp.sin(logits))

        return jax.value_and_grad(loss_fn)(params)

    loss, gradient = loss_and_gradient(CONFIG, params)
    same_loss, same_gradient = loss_and_gradient(scanned, both_stacked(params))
    chex.assert_trees_all_equal_shapes(same_gradient, _shapes(scanned))
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(same_gradient, both_stacked(gradient), rtol=1e-4, atol=1e-5)


def test_scanned_layers_drop_different_things():
    class Layer(nn.Module):
        config: model.T5Config

        @nn.compact
        def __call__(self, x):
            return x + nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            config = dataclasses.replace(CONFIG, scan_layers=True)
            return model._all_layers(Layer, config, 2, x)

    total = Stack().apply({}, jnp.zeros(64), rngs={"dropout": jax.random.key(0)})
    assert set(total.tolist()) == {0, 2, 4}  # 2: one layer dropped it, the other did not


def test_cross_entropy_averages_over_weighted_tokens_only():
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    loss, total = cross_entropy(logits, jnp.array([[0, 0, 1]]), jnp.array([[1.0, 1.0, 0.0]]))
    assert float(loss) == pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-6)
    assert float(total) == 2


def test_dropout_follows_the_key_and_is_off_without_one(params):
    loss_fn = make_loss_fn(model.T5(CONFIG))
    batch = {
        "encoder_input_tokens": _tokens(1),
        "decoder_input_tokens": _tokens(2),
        "decoder_target_tokens": _tokens(3),
        "decoder_loss_weights": jnp.ones((3, 7)),
    }
    plain = loss_fn(params, batch)[0]
    a, again, b = (loss_fn(params, batch, jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert a == again
    assert len({float(a), float(b), float(plain)}) == 3
