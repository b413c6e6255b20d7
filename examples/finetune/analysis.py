"""What is measured on a finished run: held-out metrics, sharpness, and the loss around it."""

import jax
import numpy as np

import sam_optax
from finetune import data, task
from finetune.experiment import Experiment
from finetune.loss import make_loss_fn
from finetune.model import count_parameters
from finetune.train import Problem, Result
from sam_optax import sharpness

DISTANCES = {
    "top_eigenvector": np.linspace(-0.4, 0.4, 33),
    "gradient": np.linspace(-0.4, 0.4, 33),
    "random": np.linspace(-20.0, 20.0, 21),
}
"""How far to walk from the solution, as Euclidean distance in parameter space."""


def analyse(experiment: Experiment, problem: Problem, results: dict[str, Result]) -> dict:
    """Measures the runs; the answer is plain data for `results.json`."""
    name = task.register_task(experiment.data_fraction, experiment.seed)
    test = data.load_split(name, "test", task.SEQUENCE_LENGTH, experiment.test_words)
    model_loss = make_loss_fn(problem.model)

    def loss_fn(params, batch):  # one for both runs: it is compiled once
        return model_loss(params, batch)[0]

    return {
        name: _analyse(experiment, problem, loss_fn, test, run) for name, run in results.items()
    }


def _analyse(
    experiment: Experiment, problem: Problem, loss_fn, test: data.Split, result: Result
) -> dict:
    metrics = problem.evaluator.metrics
    return {
        "parameters": count_parameters(result.last_params),
        "train_examples": len(problem.train),
        "records": result.progress.records,
        "training_seconds": result.progress.training_seconds,
        "step_flops": result.progress.step_flops,
        "best": {"step": result.best_step, **metrics(result.best_params, test)},
        "last": {"step": experiment.steps, **metrics(result.last_params, test)},
        **_landscape(experiment, problem, loss_fn, result.last_params),
    }


def _landscape(experiment: Experiment, problem: Problem, loss_fn, params) -> dict:
    number = experiment.sharpness_examples
    batch = {name: values[:number] for name, values in problem.train.features.items()}
    top = sharpness.hessian_eigenpairs(loss_fn, params, [batch], max_steps=experiment.lanczos_steps)
    uphill = sam_optax.gradient_perturbation(jax.grad(loss_fn)(params, batch), params, rho=1.0)
    directions = {
        "top_eigenvector": top.vectors[0],
        "gradient": uphill,
        "random": sharpness.random_direction(params),
    }
    return {
        "sharpness": float(top.values[0]),
        "sharpness_relative_residual": float(top.residuals[0]),
        "parameter_norm": float(jax.numpy.sqrt(sum((w**2).sum() for w in jax.tree.leaves(params)))),
        "loss_along": {
            name: {
                "distance": DISTANCES[name].tolist(),
                "loss": sharpness.loss_along(
                    loss_fn, params, [batch], direction, DISTANCES[name]
                ).tolist(),
            }
            for name, direction in directions.items()
        },
    }
