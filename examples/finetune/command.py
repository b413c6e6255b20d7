"""Both runs, then the comparison. `examples/finetune_t5.py` is the way in."""

import dataclasses
from pathlib import Path

from finetune import report
from finetune.analysis import analyse
from finetune.experiment import Experiment
from finetune.gradient import plain_gradient, sam_gradient
from finetune.interrupt import stop_on_ctrl_c
from finetune.loss import make_loss_fn
from finetune.run_directory import claim, write_json
from finetune.timing import step_seconds
from finetune.train import Problem, train


def run(experiment: Experiment, run_dir: Path) -> None:
    """Trains with and without SAM in `run_dir`, prints the table and saves the picture."""
    problem = Problem.load(experiment)
    claim(run_dir, experiment)
    print(
        f"{len(problem.train)} training examples, {len(problem.validation)} validation words; "
        f"{experiment.steps} steps of {experiment.batch_size} examples, plain and with SAM "
        f"(rho={experiment.rho}, a/b={experiment.ascent_fraction}, m={experiment.m})",
        flush=True,
    )
    loss_fn = make_loss_fn(problem.model)
    gradients = {"plain": plain_gradient(loss_fn), "sam": sam_gradient(loss_fn, experiment)}
    results = {}
    for name, gradient_fn in gradients.items():
        with stop_on_ctrl_c() as requested:
            results[name] = train(
                experiment, problem, gradient_fn, run_dir / name, name, lambda step: requested()
            )
    print("Measuring both solutions (test metrics, Hessian, loss around them) ...", flush=True)
    runs = analyse(experiment, problem, results)
    for name, seconds in step_seconds(experiment, problem, gradients).items():
        runs[name]["step_seconds"] = seconds
    write_json(
        run_dir / "results.json", {"experiment": dataclasses.asdict(experiment), "runs": runs}
    )
    report.draw(runs, run_dir / "comparison.png", _caption(experiment, runs["plain"]))
    print(f"\n{report.table(runs)}\n")
    print(f"Picture: {run_dir / 'comparison.png'}   Figures: {run_dir / 'results.json'}")
    print(f"Curves: tensorboard --logdir {run_dir}")


def _caption(experiment: Experiment, plain: dict) -> str:
    return (
        f"T5.1.1 with {plain['parameters']:,} parameters, word to pronunciation, "
        f"{plain['train_examples']:,} training examples, seed {experiment.seed}; "
        f"SAM: rho={experiment.rho}, a/b={experiment.ascent_fraction}, m={experiment.m}"
    )
