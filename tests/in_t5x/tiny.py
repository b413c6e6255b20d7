"""A tiny T5.1.1 of T5X's on the batches of the tests, and a run of its trainer."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import adafactor, models, partitioning, trainer, utils
from t5x.examples.t5 import network

from sam_optax import t5x_trainer

B, INPUTS, TARGETS, VOCABULARY = 16, 12, 8, 64
BASE, SAM = trainer.Trainer, t5x_trainer.SharpnessAwareTrainer


class OwnMesh(partitioning.PjitPartitioner):
    """T5X's partitioner on a mesh of (data, model): its own CPU mesh is all model.

    Or of (replica, data, model), as T5X has it for several slices.
    """

    def __init__(self, num_partitions, devices=None, slices=1, **kwargs):
        of_several = {"ici_mesh_shape": (1, 1, 1), "dcn_mesh_shape": (1, 1, 1)}  # not looked at
        super().__init__(
            num_partitions=num_partitions, **(of_several if slices > 1 else {}), **kwargs
        )
        devices = np.array(jax.devices()[:devices]).reshape(slices, -1, num_partitions)
        axes = ("replica", "data", "model")
        self._own_mesh = jax.sharding.Mesh(
            *((devices, axes) if slices > 1 else (devices[0], axes[1:]))
        )

    @property
    def mesh(self):
        return self._own_mesh


def adafactor_def():
    return adafactor.Adafactor(
        learning_rate=1e-3,
        decay_rate=0.8,
        step_offset=0,
        logical_factor_rules=adafactor.standard_logical_factor_rules(),
    )


def make_model(optimizer_def=None, kind=models.EncoderDecoderModel, **config):
    config = network.T5Config(
        **{
            "vocab_size": VOCABULARY,
            "emb_dim": 16,
            "num_heads": 2,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "head_dim": 8,
            "mlp_dim": 32,
            "mlp_activations": ("gelu", "linear"),
            "dropout_rate": 0.0,
            "logits_via_embedding": False,
            "dtype": "float32",
        }
        | config
    )
    vocabulary = seqio.PassThroughVocabulary(VOCABULARY)
    return kind(
        network.Transformer(config), vocabulary, vocabulary, optimizer_def or adafactor_def()
    )


def batch_at(step, packed=False):
    """A batch of T5X's, with targets of different lengths; packed, two examples to a row."""
    rng = np.random.default_rng(step)
    inputs = rng.integers(2, VOCABULARY, (B, INPUTS), dtype=np.int32)
    targets = rng.integers(2, VOCABULARY, (B, TARGETS), dtype=np.int32)
    weights = (np.arange(TARGETS) < rng.integers(1, TARGETS + 1, (B, 1))).astype(np.int32)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.roll(targets, 1, axis=1),
        "decoder_target_tokens": targets * weights,
        "decoder_loss_weights": weights,
    }
    if packed:
        for name, length in (("encoder", INPUTS), ("decoder", TARGETS)):
            second = np.tile(np.arange(length) >= length // 2, (B, 1))
            batch[f"{name}_segment_ids"] = 1 + second.astype(np.int32)
            position = np.arange(length) % (length // 2)
            batch[f"{name}_positions"] = np.tile(position, (B, 1)).astype(np.int32)
    return batch


class Run:
    """A trainer of T5X's, from random weights."""

    def __init__(
        self,
        cls=SAM,
        *,
        model=None,
        partitions=1,
        devices=None,
        slices=1,
        k=None,
        rules=None,
        packed=False,
        summary_dir=None,
        state=None,
        weight_metrics=None,
        **options,
    ):
        self.model = model or make_model()
        self.batch_at = functools.partial(batch_at, packed=packed)
        partitioner = OwnMesh(partitions, devices, slices, logical_axis_rules=rules)
        example = self.batch_at(0)
        initializer = utils.TrainStateInitializer(
            self.model.optimizer_def,
            self.model.get_initial_variables,
            {name: x.shape for name, x in example.items()},
            partitioner,
            {name: x.dtype for name, x in example.items()},
        )
        self.initializer, self.partitioner = initializer, partitioner
        self.trainer = cls(
            model=self.model,
            train_state=initializer.from_scratch(jax.random.key(0)) if state is None else state,
            partitioner=partitioner,
            eval_names=[],
            summary_dir=summary_dir,
            train_state_axes=initializer.train_state_axes,
            rng=jax.random.key(1),
            learning_rate_fn=lambda step: 1e-3,
            num_microbatches=k,
            weight_metrics_computer=weight_metrics,
            **options,
        )

    def steps(self, n, start=0):
        """Train on the batches from `start` on; return the mean metrics."""
        batches = map(self.batch_at, range(start, start + n))
        values = self.trainer.train(batches, n, start_step=start).result()
        return {name: float(np.asarray(value.value)) for name, value in values.items()}

    @property
    def state(self):
        return self.trainer.train_state

    @property
    def params(self):
        return jax.tree.map(np.asarray, self.state.params)


class CountingModel(models.EncoderDecoderModel):
    """A model with flax mutables: how often it was called, and a mean that it moves."""

    def get_initial_variables(self, *args, **kwargs):
        variables = super().get_initial_variables(*args, **kwargs)
        axes = flax.linen.partitioning.AxisMetadata(names=())
        return {
            **variables,
            "counts": {"calls": jnp.int32(0), "mean": jnp.float32(0)},
            "counts_axes": {"calls_axes": axes, "mean_axes": axes},
        }

    def loss_fn(self, params, batch, dropout_rng, flax_mutables):
        loss, metrics = super().loss_fn(params, batch, dropout_rng)
        counts = flax_mutables["counts"]
        mean = counts["mean"] + jnp.mean(batch["decoder_loss_weights"].astype(jnp.float32))
        counts = {"counts": {"calls": counts["calls"] + 1, "mean": mean}}
        return loss, (metrics, flax.core.freeze(counts))


class LinearModel(models.EncoderDecoderModel):
    """A model whose gradient is known from the dropout key, and nothing else."""

    def loss_fn(self, params, batch, dropout_rng):
        _, metrics = super().loss_fn(params, batch, dropout_rng)
        leaves = jax.tree.leaves(params)
        return sum(jnp.vdot(jax.random.normal(dropout_rng, w.shape), w) for w in leaves), metrics
