"""One run, from data to figures. With SAM or without, only the gradient in `_step` differs."""

import collections
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetune import data
from finetune import task as cmudict
from finetune.evaluate import Evaluator
from finetune.loss import make_loss_fn
from finetune.model import T5, T5Config, count_parameters

import sam_optax
from sam_optax import sharpness
from study import span_corruption, wordnet
from study.runs import SHARES, Run, Setup

VOCABULARY = 264  # SeqIO's bytes, and room for the sentinels of span corruption
PAPER_RHO = 0.15


def train(run: Run, setup: Setup, work_dir: Path) -> dict[str, Any]:
    """Train and return the figures: validation curves, test metrics of best and last, sharpness."""
    setup = run.own(setup)
    problems = {name: _held_out(name, **_lengths(run), setup=setup) for name in run.tasks}
    parts = {name: _training_examples(name, run) for name in run.tasks}
    examples = _together(list(parts.values()))
    curve: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    params: Any = None
    for step, params in enumerate(_trained(run, setup, work_dir, examples), 1):
        if step % setup.eval_every == 0 or step == setup.steps:
            record: dict[str, Any] = {"step": step}
            for name, problem in problems.items():
                record[name] = problem.evaluator.metrics(params, problem.validation)
                if name not in best or _better(record[name], best[name][1]):
                    # A copy: the step takes its parameters' memory.
                    best[name] = (step, record[name], jax.tree.map(np.array, params))
            curve.append(record)
    results: dict[str, Any] = {
        "curve": curve,
        "best": {},
        "last": {},
        "train_examples": len(examples["decoder_target_tokens"]),
        "parameters": count_parameters(params),
    }
    for name, problem in problems.items():
        step, _, best_params = best[name]
        results["best"][name] = {
            "step": step,
            **problem.evaluator.metrics(best_params, problem.test),
        }
        results["last"][name] = problem.evaluator.metrics(params, problem.test)
        results["last"][name]["train_loss"] = problem.evaluator.loss(
            params, _first(parts[name], setup.eval_examples)
        )
    if run.measures_sharpness:
        words = _first(examples, setup.sharpness_examples)
        results["sharpness"] = _sharpness(plain_loss(setup), params, words)
    return results


def solution(run: Run, setup: Setup, work_dir: Path) -> tuple[Any, dict[str, data.Arrays]]:
    """Train and return the last parameters, and some training and test words of the first task."""
    setup = run.own(setup)
    name = run.tasks[0]
    examples = _together([_training_examples(name, run) for name in run.tasks])
    (params,) = collections.deque(_trained(run, setup, work_dir, examples), maxlen=1)
    task, number = _task(name, 1.0, 0), setup.sharpness_examples
    test = data.load_split(task, "test", _lengths(run), number).features
    return params, {"training": _first(examples, number), "test": test}


def plain_loss(setup: Setup) -> Any:
    """The loss `(params, batch)` without dropout, as everything is evaluated."""
    with_aux = make_loss_fn(_model(setup))
    return lambda params, batch: with_aux(params, batch)[0]


def _trained(run: Run, setup: Setup, work_dir: Path, examples: data.Arrays) -> Iterator[Any]:
    """Yield the parameters after each step. The next step takes their memory."""
    params = _pretrained(run.seed, setup, work_dir) if run.pretrained else _fresh(run.seed, setup)
    step_fn = _step(setup, run.rho > 0, run.ascent_fraction, run.m, run.m_sharpness)
    state = optax.adafactor(setup.learning_rate).init(params)
    key = jax.random.key(run.seed)
    for step in range(setup.steps):
        batch = data.batch_at(examples, run.seed, step, setup.batch_size)
        params, state, _ = step_fn(params, state, batch, jax.random.fold_in(key, step), run.rho)
        yield params


def pretrain(seed: int, setup: Setup, work_dir: Path) -> float:
    """Train on span corruption from random weights, save the weights and return the last loss."""
    corpus = span_corruption.words()
    step_fn = _step(setup, sam=False)
    params, key = _fresh(seed, setup), jax.random.key(1000 + seed)
    state, losses = optax.adafactor(setup.learning_rate).init(params), []
    for step in range(setup.pretraining_steps):
        batch = span_corruption.batch_at(corpus, seed, step, setup.batch_size)
        params, state, loss = step_fn(params, state, batch, jax.random.fold_in(key, step), 0.0)
        losses.append(loss)
    path = pretrained_path(seed, setup, work_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(flax.serialization.to_bytes(params))
    partial.rename(path)
    return float(np.mean(jax.device_get(losses[-200:])))


def pretrained_path(seed: int, setup: Setup, work_dir: Path) -> Path:
    """Where the pre-trained weights of a seed are."""
    return work_dir / f"pretrained_{setup.pretraining_steps}_{setup.d_model}_seed{seed}.msgpack"


class _HeldOut(NamedTuple):
    validation: data.Split
    test: data.Split
    evaluator: Evaluator


def _lengths(run: Run) -> dict[str, int]:
    # A mixture's tasks have one shape.
    return (cmudict if run.tasks == ("cmudict",) else wordnet).SEQUENCE_LENGTH


def _task(name: str, fraction: float, seed: int) -> str:
    return {"cmudict": cmudict, "wordnet": wordnet}[name].register_task(fraction, seed)


def _training_examples(name: str, run: Run) -> data.Arrays:
    task = _task(name, min(1.0, run.data_fraction * SHARES[name]), run.seed)
    return data.load_split(task, "train", _lengths(run)).features


@functools.cache
def _held_out(name: str, inputs: int, targets: int, setup: Setup) -> _HeldOut:
    """The same words for every seed and subset."""
    task, lengths = _task(name, 1.0, 0), {"inputs": inputs, "targets": targets}
    return _HeldOut(
        data.load_split(task, "validation", lengths, setup.eval_examples),
        data.load_split(task, "test", lengths, setup.test_examples),
        Evaluator(_model(setup), task, targets, batch_size=256),
    )


@functools.cache
def _model(setup: Setup) -> T5:
    return T5(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=setup.d_model,
            num_heads=setup.num_heads,
            head_dim=setup.d_model // setup.num_heads,
            d_ff=setup.d_ff,
            num_encoder_layers=setup.num_layers,
            num_decoder_layers=setup.num_layers,
            dropout_rate=setup.dropout_rate,
        )
    )


def _fresh(seed: int, setup: Setup) -> Any:
    tokens = jnp.ones((1, 2), jnp.int32)
    return jax.jit(_model(setup).init)(jax.random.key(seed), tokens, tokens)["params"]


def _pretrained(seed: int, setup: Setup, work_dir: Path) -> Any:
    saved = pretrained_path(seed, setup, work_dir).read_bytes()
    return jax.tree.map(jnp.asarray, flax.serialization.from_bytes(_fresh(seed, setup), saved))


@functools.cache
def _step(
    setup: Setup, sam: bool, ascent_fraction: float = 1.0, m: int = 1, m_sharpness: str = "paper"
) -> Any:
    """A jitted step; one compilation serves every rho, seed and subset."""
    loss_fn = make_loss_fn(_model(setup))
    optimizer = optax.adafactor(setup.learning_rate)
    form = _in_foret_form if m_sharpness == "foret" else _in_the_papers_form

    def step(params, state, batch, dropout_key, rho):
        if sam:
            gradient = form(loss_fn, rho, ascent_fraction, m)
        else:
            gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, _), grads = gradient(params, batch, dropout_key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _in_the_papers_form(loss_fn: Any, rho: Any, ascent_fraction: float, m: int) -> Any:
    return sam_optax.value_and_grad(loss_fn, rho, ascent_fraction, m, has_aux=True)


def _in_foret_form(loss_fn: Any, rho: Any, ascent_fraction: float, m: int) -> Any:
    """Every group has a part of the batch, which is the mean over its tokens, and its own masks."""

    def with_keys(params, batch, dropout_keys):
        return loss_fn(params, batch, dropout_keys[0])

    gradient = sam_optax.value_and_grad(
        with_keys,
        rho,
        ascent_fraction,
        m,
        m_sharpness="foret",
        loss_reduction=lambda batch, _: batch["decoder_loss_weights"].sum(),
        batch_argnums=(1, 2),
        has_aux=True,
    )

    def with_key(params, batch, dropout_key):
        examples = len(batch["decoder_target_tokens"])
        return gradient(params, batch, jax.random.split(dropout_key, examples))

    return with_key


def _better(metrics: dict[str, float], than: dict[str, float]) -> bool:
    def order(x: dict[str, float]) -> tuple[float, float]:
        return x["exact_match"], -x["loss"]

    return order(metrics) > order(than)


def _sharpness(loss_fn: Any, params: Any, batch: data.Arrays) -> dict[str, float]:
    top = sharpness.hessian_eigenpairs(loss_fn, params, [batch], max_steps=30)
    near = sharpness.epsilon_sharpness(loss_fn, params, [batch], rho=PAPER_RHO)
    return {
        "top_eigenvalue": float(top.values[0]),
        "relative_residual": float(top.residuals[0]),
        "epsilon_sharpness": float(near.rise),
    }


def _first(features: data.Arrays, number: int) -> data.Arrays:
    return {name: values[:number] for name, values in features.items()}


def _together(parts: list[data.Arrays]) -> data.Arrays:
    """Mixed in proportion to the number of examples, as the paper's mixtures are."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
