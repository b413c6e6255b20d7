"""How long a step takes with each gradient, measured side by side."""

import time

import numpy as np

from finetune.data import batch_at
from finetune.experiment import Experiment
from finetune.train import Problem, adafactor, initial_state, make_train_step


def step_seconds(
    experiment: Experiment, problem: Problem, gradients: dict, repeats: int = 25
) -> dict[str, float]:
    """The median duration of a step with each gradient function.

    The steps take turns, so other work on the machine slows all of them alike. The times of the two
    training runs, which come one after the other, would not bear comparison.
    """
    optimizer = adafactor(experiment.learning_rate)
    batch = batch_at(problem.train.features, experiment.seed, 0, experiment.batch_size)
    steps, states, seconds = {}, {}, {}
    for name, gradient_fn in gradients.items():
        state = initial_state(problem.model, optimizer, experiment.seed)
        train_step = make_train_step(gradient_fn, optimizer, experiment.seed)
        steps[name] = train_step.lower(state, batch).compile()
        states[name], seconds[name] = state, []
    for _ in range(repeats):
        for name, compiled in steps.items():
            began = time.perf_counter()
            states[name], loss = compiled(states[name], batch)
            loss.block_until_ready()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}
