"""The training loop, the same for every gradient function."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metric_writers
from tqdm import tqdm

from finetune import data, task
from finetune.checkpoints import Checkpoints, shapes_of
from finetune.evaluate import Evaluator
from finetune.experiment import Experiment
from finetune.interrupt import Interrupted
from finetune.model import T5

SYNC_EVERY = 20  # steps between reading the loss back, which waits for the device


class TrainState(NamedTuple):
    """What a step turns into the next."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass
class Progress:
    """What the run has shown so far; kept inside each checkpoint."""

    records: list[dict] = dataclasses.field(default_factory=list)
    """One for each evaluation: step, train_loss, and validation loss and metrics."""
    training_seconds: float = 0.0
    """Spent on steps: evaluation, checkpoints and compilation apart."""
    step_flops: float = 0.0
    """Of one compiled step, by XLA's count."""

    def best_step(self) -> int | None:
        """The step with the highest validation exact match; of equals, the lowest error rate."""
        if not self.records:
            return None
        return min(self.records, key=_worse_first)["step"]


def _worse_first(record: dict):
    return -record["exact_match"], record["phoneme_error_rate"], record["step"]


@dataclasses.dataclass
class Result:
    """A finished run."""

    last_params: Any
    best_params: Any
    best_step: int
    progress: Progress


@dataclasses.dataclass
class Problem:
    """The data and the model that every run of an experiment shares."""

    model: T5
    train: data.Split
    validation: data.Split
    evaluator: Evaluator

    @classmethod
    def load(cls, experiment: Experiment) -> "Problem":
        """Registers the experiment's Task and reads it."""
        name = task.register_task(experiment.data_fraction, experiment.seed)
        lengths = task.SEQUENCE_LENGTH
        model = T5(experiment.model)
        batch_size = min(256, max(experiment.eval_words, experiment.test_words))
        train = data.load_split(name, "train", lengths)
        data.batch_at(train.features, experiment.seed, 0, experiment.batch_size)  # or an error now
        return cls(
            model,
            train,
            data.load_split(name, "validation", lengths, experiment.eval_words),
            Evaluator(model, name, lengths["targets"], batch_size),
        )


def initial_state(model: T5, optimizer, seed: int) -> TrainState:
    """Fresh parameters and optimizer state."""
    params = _initial_params(model, jax.random.fold_in(jax.random.key(seed), 0))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@functools.partial(jax.jit, static_argnums=0)  # once for a model, however many runs it has
def _initial_params(model: T5, key: jax.Array):
    tokens = jnp.ones((1, 2), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


# The same optimizer for the same rate, and so the same step below.
adafactor = functools.cache(optax.adafactor)


@functools.lru_cache(maxsize=2)  # plain and SAM, which `timing.py` measures without compiling anew
def make_train_step(gradient_fn, optimizer, seed: int):
    """Builds the jitted `train_step(state, batch) -> (state, loss)`; `state` is donated."""

    def train_step(state: TrainState, batch):
        dropout_key = jax.random.fold_in(jax.random.key(seed), 1)
        dropout_key = jax.random.fold_in(dropout_key, state.step)
        (loss, _), grads = gradient_fn(state.params, batch, dropout_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    return jax.jit(train_step, donate_argnums=0)


def train(
    experiment: Experiment,
    problem: Problem,
    gradient_fn,
    run_dir: Path,
    label: str,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> Result:
    """Trains with `gradient_fn` from the last checkpoint in `run_dir`, or from the start.

    Args:
      experiment: the settings.
      problem: its data and model.
      gradient_fn: `(params, batch, dropout_key) -> ((loss, aux), grads)`.
      run_dir: for checkpoints and TensorBoard files.
      label: the run's name in the progress bar.
      should_stop: asked before each step.

    Raises:
      Interrupted: `should_stop` was true; a checkpoint of that step is saved.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints")
    optimizer = adafactor(experiment.learning_rate)
    state = initial_state(problem.model, optimizer, experiment.seed)
    like, progress = shapes_of(state), Progress()
    step = checkpoints.latest_step() or 0
    if checkpoints.latest_step() is not None:
        state, saved = checkpoints.restore(step, like)
        progress = Progress(**saved)
    if step < experiment.steps:
        loop = _Loop(experiment, problem, gradient_fn, optimizer, checkpoints, run_dir, label)
        state = loop.run(state, step, progress, should_stop)
    best = progress.best_step()
    best_state, _ = checkpoints.restore(best, like)
    checkpoints.close()
    return Result(state.params, best_state.params, best, progress)


class _Loop:
    """`train`, past the decision where to begin."""

    def __init__(self, experiment, problem, gradient_fn, optimizer, checkpoints, run_dir, label):
        self.experiment = experiment
        self.problem = problem
        self.train_step = make_train_step(gradient_fn, optimizer, experiment.seed)
        self.checkpoints = checkpoints
        self.writer = metric_writers.SummaryWriter(str(run_dir / "tensorboard"))
        self.label = label

    def run(self, state, step, progress, should_stop) -> TrainState:
        steps = self.experiment.steps
        # Compiled once, ahead of time: a batch of another shape would be an error, not a recompile.
        compiled = self.train_step.lower(state, self._batch(step)).compile()
        progress.step_flops = compiled.cost_analysis()["flops"]
        often = 1 if sys.stderr.isatty() else 30  # a log file keeps every line
        name = f"{self.label:>5}"
        bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=often)
        with bar, metric_writers.ensure_flushes(self.writer):
            while step < steps:
                block_end = min(step + SYNC_EVERY, self._next_evaluation(step))
                block_start, began = step, time.perf_counter()
                while step < block_end and not should_stop(step):
                    state, loss = compiled(state, self._batch(step))
                    step += 1
                if step > block_start:
                    self._close_block(bar, progress, block_start, step, began, loss)
                if step == self._next_evaluation(block_start):
                    progress.records.append(self._evaluate(step, state.params))
                    self._save(step, state, progress)
                elif step < block_end:
                    self._save(step, state, progress)
                    raise Interrupted(step)
        return state

    def _batch(self, step):
        features = self.problem.train.features
        return data.batch_at(features, self.experiment.seed, step, self.experiment.batch_size)

    def _next_evaluation(self, step) -> int:
        every = self.experiment.eval_every
        return min(self.experiment.steps, (step // every + 1) * every)

    def _close_block(self, bar, progress, start, end, began, loss):
        loss = float(loss)  # waits for the device, so the clock below is right
        progress.training_seconds += time.perf_counter() - began
        bar.update(end - start)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.writer.write_scalars(end, {"train/batch_loss": loss})

    def _evaluate(self, step, params) -> dict:
        problem, number = self.problem, self.experiment.eval_words
        seen = {name: values[:number] for name, values in problem.train.features.items()}
        record = {"step": step, "train_loss": problem.evaluator.loss(params, seen)}
        record |= problem.evaluator.metrics(params, problem.validation)
        scalars = {
            f"validation/{k}": v for k, v in record.items() if k not in ("step", "train_loss")
        }
        scalars["train/loss"] = record["train_loss"]
        self.writer.write_scalars(step, scalars)
        return record

    def _save(self, step, state, progress):
        keep = {progress.best_step()} - {None}
        self.checkpoints.save(step, state, dataclasses.asdict(progress), keep)
