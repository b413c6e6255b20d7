"""What T5X's own train step costs on a TPU slice with SAM, as a ratio to without, with no TPU.

  python benchmarks/t5x_tpu_cost.py --sizes base --slices v5e:4x4

As `tpu_cost.py`, with T5X's network, optimizer, partitioner and trainer: the program that
`python -m t5x.train` runs on each step. Needs T5X (see t5x_configs/README.md) and jax[tpu].
"""

import tpu_cost  # first: before JAX starts it tells libtpu that no TPU is attached

# isort: split
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ahead_of_time
import jax
import seqio
from cost_table import LEGEND
from jax.sharding import Mesh
from t5x import adafactor, models, partitioning, trainer, utils
from t5x.examples.t5 import network

from sam_optax.t5x_trainer import SharpnessAwareTrainer

# T5.1.1 as in t5x/examples/t5/t5_1_1/{base,xl}.gin, with the paper's dropout in fine-tuning.
_T5_1_1 = functools.partial(
    network.T5Config,
    vocab_size=32128,
    dtype="bfloat16",
    head_dim=64,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.1,
    logits_via_embedding=False,
)
_BASE_WIDTH = {"emb_dim": 768, "num_heads": 12, "mlp_dim": 2048}
SIZES = {
    "mini": _T5_1_1(num_encoder_layers=2, num_decoder_layers=2, **_BASE_WIDTH),
    "base": _T5_1_1(num_encoder_layers=12, num_decoder_layers=12, **_BASE_WIDTH),
    "xl": _T5_1_1(
        num_encoder_layers=24, num_decoder_layers=24, emb_dim=2048, num_heads=32, mlp_dim=5120
    ),
}
_SAM = functools.partial(functools.partial, SharpnessAwareTrainer)
STEPS = {
    "plain": trainer.Trainer,
    "full SAM": _SAM(ascent_fraction=1.0),
    "ours": _SAM(),
    "ours, ascent in bf16": _SAM(reduction_dtype="bfloat16"),
    "groups = shards": _SAM(group_axes="data"),
    "groups = shards, in bf16": _SAM(group_axes="data", reduction_dtype="bfloat16"),
    "groups = shards, in bf16, no diagnostics": _SAM(
        group_axes="data", reduction_dtype="bfloat16", diagnostics=False
    ),
}

HEAD = f"""# What T5X's train step costs on TPU slices with SAM, as ratios to T5X's own

Compiled ahead of time by `t5x_tpu_cost.py`, per device; nothing was run. T5X's T5.1.1, Adafactor,
`PjitPartitioner` and trainer (*plain*), and `SharpnessAwareTrainer`: bfloat16 activations, float32
parameters, dropout 0.1, 128 examples of 512 and 62 tokens. The diagnostics that the trainer logs
are in these numbers, but where it says so.

{LEGEND}"""


class OnASlice(partitioning.PjitPartitioner):
    """T5X's partitioner, on the described devices of a slice, or of several.

    T5X's mesh of several has one axis more, `replica`, and its batch is sharded over both.
    """

    def __init__(self, mesh: Mesh):
        several = {"ici_mesh_shape": (1, 1, 1), "dcn_mesh_shape": (1, 1, 1)}  # not looked at
        super().__init__(num_partitions=1, **(several if "replica" in mesh.shape else {}))
        self._slice_mesh = mesh

    @property
    def mesh(self) -> Mesh:
        """The mesh of the slice."""
        return self._slice_mesh


def make_model(config: network.T5Config) -> models.EncoderDecoderModel:
    """T5X's model, with the optimizer of its gin files."""
    optimizer = adafactor.Adafactor(
        decay_rate=0.8,
        step_offset=0,
        logical_factor_rules=adafactor.standard_logical_factor_rules(),
    )
    vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
    return models.EncoderDecoderModel(
        network.Transformer(config), vocabulary, vocabulary, optimizer
    )


class Compiled(NamedTuple):
    """A trainer's compiled step, its train state's shapes, where that lies, and what it took."""

    program: jax.stages.Compiled
    state: Any
    axes: Any
    constraints: int
    seconds: float


def compile_step(
    config: network.T5Config, trainer_of: Callable[..., trainer.BaseTrainer], mesh: Mesh
) -> Compiled:
    """Compile the step of a trainer of T5X's, or of ours."""
    partitioner = OnASlice(mesh)
    model, batch = make_model(config), ahead_of_time.batch_shapes()
    initializer = utils.TrainStateInitializer(
        model.optimizer_def,
        model.get_initial_variables,
        {name: x.shape for name, x in batch.items()},
        partitioner,
        {name: x.dtype for name, x in batch.items()},
    )
    state, axes = initializer.global_train_state_shape, initializer.train_state_axes
    with trainer_of(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=axes,
        rng=jax.random.key(0),
        learning_rate_fn=lambda step: 1e-3,
        num_microbatches=None,
    ) as made:
        start = time.perf_counter()
        # T5X leaves its constraints out where the devices that JAX sees are CPUs. Flax, through
        # which the model's go, does not.
        with mock.patch.object(
            partitioning, "with_sharding_constraint", jax.lax.with_sharding_constraint
        ):
            lowered = made._partitioned_train_step.lower(state, batch)
        constraints = lowered.as_text().count("sharding_constraint")
        program = lowered.compile()
        return Compiled(program, state, axes, constraints, time.perf_counter() - start)


def compile_case(
    case: ahead_of_time.Case, mesh: Mesh, hlo_folder: Path | None = None
) -> dict[str, Any]:
    """Compile the trainer's step and return what the JSON holds of it."""
    program, state, axes, constraints, seconds = compile_step(
        SIZES[case.size], STEPS[case.step], mesh
    )
    ahead_of_time.save_hlo(case, program, hlo_folder)
    sizes = [
        4 * math.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(w.shape))
        for w, spec in zip(jax.tree.leaves(state.params), jax.tree.leaves(axes.params), strict=True)
    ]
    return ahead_of_time.measurements(program, program.cost_analysis(), case) | {
        "parameter_bytes": sum(sizes),
        "compile_seconds": round(seconds, 1),
        "parameters": sum(math.prod(w.shape) for w in jax.tree.leaves(state.params)),
        "sharding_constraints": constraints,
    }


if __name__ == "__main__":
    ahead_of_time.main(
        tpu_cost.SLICES,
        tpu_cost.describe,
        ahead_of_time.RESULTS / "t5x_tpu_cost.json",
        compile_case,
        SIZES,
        ["data"],
        STEPS,
        head=HEAD,
    )
