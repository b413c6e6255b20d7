"""T5.1.1 in Flax linen: the encoder-decoder Transformer of the T5 v1.1 checkpoints.

What makes it T5.1.1: gated-GELU feed-forward layers, RMS norm with a scale and nothing else, no
bias vector anywhere, bucketed relative positions (one table for each stack, shared by its layers)
and no absolute ones, no 1/sqrt(head_dim) in attention (the query initialiser carries it), and
output logits that do not share the input embedding.

Parameters are float32; `T5Config.dtype` is the type of the activations. Norm statistics, attention
softmax and logits are float32 whatever it is. Layers are an ordinary Python loop, or one layer that
is scanned (`T5Config.scan_layers`), and projection parameters are shaped `[embed, heads, head_dim]`
or `[embed, joined]`, so a mesh rule can name each axis.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

PAD_ID = 0  # also the decoder's start token, as T5 has it


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The numbers that define one T5.1.1.

    With `scan_layers` a stack is one layer that is scanned, as models too large for a device are
    written: it is compiled once, its parameters have the layers' number as their first dimension,
    and the backward pass computes a layer's activations again instead of keeping them.
    """

    vocab_size: int = 32128
    d_model: int = 512
    num_heads: int = 6
    head_dim: int = 64
    d_ff: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    dropout_rate: float = 0.1
    relative_position_buckets: int = 32
    relative_position_max_distance: int = 128
    dtype: Any = "float32"
    scan_layers: bool = False


def t5_1_1_small(**changes) -> T5Config:
    """T5.1.1 Small, 77M parameters. `changes` replace single fields, e.g. `dtype="bfloat16"`."""
    return dataclasses.replace(T5Config(), **changes)


def t5_1_1_base(**changes) -> T5Config:
    """T5.1.1 Base, 248M parameters."""
    return _public_size(d_model=768, d_ff=2048, layers=12, heads=12, changes=changes)


def t5_1_1_large(**changes) -> T5Config:
    """T5.1.1 Large, 783M parameters."""
    return _public_size(d_model=1024, d_ff=2816, layers=24, heads=16, changes=changes)


def t5_1_1_xl(**changes) -> T5Config:
    """T5.1.1 XL, 2.85B parameters."""
    return _public_size(d_model=2048, d_ff=5120, layers=24, heads=32, changes=changes)


def _public_size(d_model, d_ff, layers, heads, changes) -> T5Config:
    size = T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
    )
    return dataclasses.replace(size, **changes)


PUBLIC_SIZES = {
    "small": t5_1_1_small,
    "base": t5_1_1_base,
    "large": t5_1_1_large,
    "xl": t5_1_1_xl,
}


def count_parameters(params) -> int:
    """The number of scalars in a tree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def relative_position_bucket(
    relative_position: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Maps `key position - query position` to the row of the bias table.

    Half of the buckets hold one distance each; the other half grow logarithmically up to
    `max_distance`, and everything further shares the last one. Bidirectional attention splits the
    buckets evenly between keys before and after the query; otherwise keys after it are bucket 0.
    """
    bucket = np.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        bucket += np.where(relative_position > 0, num_buckets, 0)
        distance = np.abs(relative_position)
    else:
        distance = np.maximum(-relative_position, 0)
    exact = num_buckets // 2
    fraction = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    # The 1e-9 keeps exact powers, such as distance 16 of 8..128, from rounding down a bucket.
    logarithmic = exact + np.floor(fraction * (num_buckets - exact) + 1e-9).astype(bucket.dtype)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    return bucket + np.where(distance < exact, distance, logarithmic)


def _fan_in_normal(in_axis, out_axis, scale: float = 1.0):
    """A truncated normal of standard deviation sqrt(scale / fan-in), T5's initialiser."""
    return nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis
    )


class Projection(nn.Module):
    """A bias-free linear map, `einsum(equation, x, kernel)`."""

    equation: str
    shape: tuple[int, ...]
    initializer: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.initializer, self.shape, jnp.float32)
        return jnp.einsum(self.equation, x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm: divide by the root mean square and scale; no mean, no bias."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


class RelativePositionBias(nn.Module):
    """A learned number for each head and bucketed distance, added to attention scores."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_length: int, key_length: int) -> jax.Array:
        """Returns the bias, `[1, heads, query, key]`."""
        config = self.config
        table = self.param(
            "embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (config.relative_position_buckets, config.num_heads),
            jnp.float32,
        )
        # One row of the table for each distance, from -(query_length - 1) to key_length - 1, and
        # not for each pair: a lookup's gradient is a scatter, with which the compiler for GPUs
        # fuses the sums over the batch of all layers to one slow kernel.
        buckets = relative_position_bucket(
            np.arange(1 - query_length, key_length),
            self.bidirectional,
            config.relative_position_buckets,
            config.relative_position_max_distance,
        )
        by_distance = table[buckets].T
        # Each query's row of the bias starts one distance before the last one's. With a column
        # more, read again at the old width, every row starts one element later than the last.
        heads, distances = by_distance.shape
        rows = jnp.broadcast_to(by_distance[:, None], (heads, query_length, distances))
        wider = jnp.pad(rows, ((0, 0), (0, 0), (0, 1))).reshape(heads, -1)
        skewed = wider[:, : query_length * distances].reshape(rows.shape)
        return skewed[None, :, :, query_length - 1 :]


class Attention(nn.Module):
    """Multi-head attention; the scores are not divided by sqrt(head_dim)."""

    config: T5Config

    def setup(self):
        config = self.config
        into = (config.d_model, config.num_heads, config.head_dim)
        back = (config.num_heads, config.head_dim, config.d_model)

        def heads(scale=1.0):
            init = _fan_in_normal(in_axis=0, out_axis=(1, 2), scale=scale)
            return Projection("bld,dhk->blhk", into, init, config.dtype)

        # The scale that attention lacks sits in the query's initial size.
        self.query = heads(1.0 / config.head_dim)
        self.key = heads()
        self.value = heads()
        out_init = _fan_in_normal(in_axis=(0, 1), out_axis=2)
        self.out = Projection("blhk,hkd->bld", back, out_init, config.dtype)
        self.dropout = _dropout(config)

    def __call__(self, x, memory, mask, bias, deterministic):
        """Attends from `x` to `memory` where `mask` (broadcastable to the scores) is true."""
        scores = jnp.einsum("bqhk,bmhk->bhqm", self.query(x), self.key(memory))
        scores = scores.astype(jnp.float32)
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e10)).astype(self.config.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        return self.out(jnp.einsum("bhqm,bmhk->bqhk", weights, self.value(memory)))


class GatedGelu(nn.Module):
    """The feed-forward layer: `(gelu(x wi_0) * x wi_1) wo`, with the tanh form of GELU."""

    config: T5Config

    @nn.compact
    def __call__(self, x, deterministic):
        config = self.config
        into, back = (config.d_model, config.d_ff), (config.d_ff, config.d_model)
        init = _fan_in_normal(in_axis=0, out_axis=1)
        gate = Projection("bld,df->blf", into, init, config.dtype, name="wi_0")(x)
        linear = Projection("bld,df->blf", into, init, config.dtype, name="wi_1")(x)
        hidden = jax.nn.gelu(gate, approximate=True) * linear
        hidden = _dropout(config)(hidden, deterministic=deterministic)
        return Projection("blf,fd->bld", back, init, config.dtype, name="wo")(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normalised before and added back."""

    config: T5Config

    @nn.compact
    def __call__(self, x, mask, bias, deterministic):
        config = self.config
        y = RMSNorm(config.dtype, name="attention_norm")(x)
        y = Attention(config, name="attention")(y, y, mask, bias, deterministic)
        x = x + _dropout(config)(y, deterministic=deterministic)
        y = RMSNorm(config.dtype, name="mlp_norm")(x)
        y = GatedGelu(config, name="mlp")(y, deterministic)
        return x + _dropout(config)(y, deterministic=deterministic)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and feed-forward."""

    config: T5Config

    @nn.compact
    def __call__(self, x, encoded, self_mask, cross_mask, bias, deterministic):
        config = self.config
        y = RMSNorm(config.dtype, name="attention_norm")(x)
        y = Attention(config, name="attention")(y, y, self_mask, bias, deterministic)
        x = x + _dropout(config)(y, deterministic=deterministic)
        y = RMSNorm(config.dtype, name="cross_attention_norm")(x)
        y = Attention(config, name="cross_attention")(y, encoded, cross_mask, None, deterministic)
        x = x + _dropout(config)(y, deterministic=deterministic)
        y = RMSNorm(config.dtype, name="mlp_norm")(x)
        y = GatedGelu(config, name="mlp")(y, deterministic)
        return x + _dropout(config)(y, deterministic=deterministic)


def _all_layers(layer, config, count, x, *shared):
    """What `count` layers make of `x`; called inside a stack, whose submodules they are."""
    if not config.scan_layers:
        for i in range(count):
            x = layer(config, name=f"layer_{i}")(x, *shared)
        return x

    scanned = nn.scan(
        nn.remat(lambda module, x, _: (module(x, *shared), None)),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=count,
    )
    return scanned(layer(config, name="layers"), x, None)[0]


class Encoder(nn.Module):
    """The encoder stack, from embedded inputs to their final representations."""

    config: T5Config

    @nn.compact
    def __call__(self, x, input_tokens, deterministic):
        config, length = self.config, x.shape[1]
        mask = _key_mask(input_tokens)
        bias = RelativePositionBias(config, bidirectional=True, name="relative_bias")(
            length, length
        )
        x = _dropout(config)(x, deterministic=deterministic)
        x = _all_layers(
            EncoderLayer, config, config.num_encoder_layers, x, mask, bias, deterministic
        )
        x = RMSNorm(config.dtype, name="final_norm")(x)
        return _dropout(config)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder stack, from embedded decoder inputs to the states the logits are read from."""

    config: T5Config

    @nn.compact
    def __call__(self, x, encoded, input_tokens, deterministic):
        config, length = self.config, x.shape[1]
        # Targets are padded at the end only, so causality alone hides the padding.
        self_mask = np.tril(np.ones((length, length), bool))[None, None]
        cross_mask = _key_mask(input_tokens)
        bias = RelativePositionBias(config, bidirectional=False, name="relative_bias")(
            length, length
        )
        x = _dropout(config)(x, deterministic=deterministic)
        shared = encoded, self_mask, cross_mask, bias, deterministic
        x = _all_layers(DecoderLayer, config, config.num_decoder_layers, x, *shared)
        x = RMSNorm(config.dtype, name="final_norm")(x)
        return _dropout(config)(x, deterministic=deterministic)


class T5(nn.Module):
    """The whole model: `T5(config).apply({"params": p}, inputs, decoder_inputs)` are logits."""

    config: T5Config

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(1.0),
            (config.vocab_size, config.d_model),
            jnp.float32,
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        head_init = _fan_in_normal(in_axis=0, out_axis=1)
        head_shape = (config.d_model, config.vocab_size)
        self.logits = Projection("bld,dv->blv", head_shape, head_init, jnp.float32)

    def encode(self, input_tokens, deterministic: bool = True):
        """The encoder's output, `[batch, length, d_model]`."""
        return self.encoder(self._embed(input_tokens), input_tokens, deterministic)

    def decode(self, encoded, input_tokens, decoder_tokens, deterministic: bool = True):
        """Float32 logits of the token after each of `decoder_tokens`."""
        x = self._embed(decoder_tokens)
        return self.logits(self.decoder(x, encoded, input_tokens, deterministic))

    def __call__(self, input_tokens, decoder_tokens, deterministic: bool = True):
        """Encodes, then decodes with teacher forcing."""
        encoded = self.encode(input_tokens, deterministic)
        return self.decode(encoded, input_tokens, decoder_tokens, deterministic)

    def _embed(self, tokens):
        return self.embedding.astype(self.config.dtype)[tokens]


def _key_mask(input_tokens):
    """True at real tokens, shaped to hide padding keys in `[batch, heads, query, key]` scores."""
    return (input_tokens != PAD_ID)[:, None, None, :]


def _dropout(config):
    """Dropout with one mask for all positions of a sequence (for all queries, in attention)."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
