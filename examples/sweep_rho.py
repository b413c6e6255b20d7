"""Chooses rho on the validation split: trains with several values and seeds, one after another.

    python examples/sweep_rho.py --rhos 0 0.05 0.1 0.15 0.2 0.3 0.4 --seeds 0 1

rho 0 is plain training. Takes the settings of examples/configs/cmudict.gin, `--gin_file` and
`--gin.NAME=VALUE` like finetune_t5.py. Each finished run is a line of `results.jsonl` in --run_dir.
The same command again goes on where it stopped, skips what is there, and prints the table.

The best checkpoint of a run is chosen on `eval_words` validation words, as in finetune_t5.py; the
table then shows that and the last checkpoint on all validation words. Test words are not used.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES))  # for `finetune`, from whichever folder this is run


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the `--gin.NAME=VALUE` overrides without their prefix."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rhos = [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4]
    parser.add_argument("--rhos", type=float, nargs="+", default=rhos)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gin_file", action="append")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/sweep_rho"))
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if not argument.startswith("--gin.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; settings are changed as --gin.NAME=VALUE")
    if not all(0 <= rho < math.inf for rho in options.rhos):
        parser.error(f"--rhos {options.rhos}: each must be finite and at least 0")
    if min(options.seeds) < 0:
        parser.error(f"--seeds {options.seeds}: each must be at least 0")
    return options, [argument.removeprefix("--gin.") for argument in rest]


def read_lines(path: Path) -> list[dict]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, line: dict) -> None:
    """Adds a finished run; a process killed here leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    lines = [*read_lines(path), line]
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def load(experiment):
    """What the runs of one seed share: the problem, and the whole validation split."""
    from finetune import data, task
    from finetune.train import Problem

    name = task.register_task(experiment.data_fraction, experiment.seed)
    return Problem.load(experiment), data.load_split(name, "validation", task.SEQUENCE_LENGTH)


def train_once(experiment, problem, validation, run_dir: Path) -> dict:
    """One run, and its best and last checkpoint on the whole validation split."""
    from finetune.gradient import plain_gradient, sam_gradient
    from finetune.loss import make_loss_fn
    from finetune.train import train

    loss_fn = make_loss_fn(problem.model)
    sam = experiment.rho > 0
    gradient_fn = sam_gradient(loss_fn, experiment) if sam else plain_gradient(loss_fn)
    result = train(experiment, problem, gradient_fn, run_dir, run_dir.name)
    return {
        "rho": experiment.rho,
        "seed": experiment.seed,
        "best_step": result.best_step,
        "best": problem.evaluator.metrics(result.best_params, validation),
        "last": problem.evaluator.metrics(result.last_params, validation),
        "train_loss": result.progress.records[-1]["train_loss"],
        "training_seconds": result.progress.training_seconds,
    }


def table(lines: list[dict]) -> str:
    """Means over seeds, one row for each rho."""
    header = "rho   seeds | best: match   PER    loss | last: match   PER    loss | train loss"
    rows = [header]
    for rho in sorted({line["rho"] for line in lines}):
        group = [line for line in lines if line["rho"] == rho]
        cells = [_metrics([line[which] for line in group]) for which in ("best", "last")]
        train_loss = sum(line["train_loss"] for line in group) / len(group)
        rows.append(f"{rho:<5g} {len(group):5d} | {cells[0]} | {cells[1]} | {train_loss:.4f}")
    return "\n".join(rows)


def _metrics(results: list[dict]) -> str:
    names = ("exact_match", "phoneme_error_rate", "loss")
    match, errors, loss = (sum(r[name] for r in results) / len(results) for name in names)
    return f"{match:10.2f}% {errors:5.2f}% {loss:6.3f}"


def main(arguments: list[str]) -> int:
    """Runs what is missing and prints the table."""
    options, overrides = parse_arguments(arguments)
    from finetune.gin_config import ConfigError, read_experiment
    from finetune.run_directory import RunDirectoryError, check, claim

    try:
        common = read_experiment(options.gin_file or ["cmudict.gin"], overrides)
        # The settings that the sweep itself sets say nothing about which sweep this is.
        this_sweep = dataclasses.replace(common, rho=0.0, seed=0)
        check(options.run_dir, this_sweep, resume=True)
    except (ConfigError, RunDirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from finetune import quiet_tensorflow

    quiet_tensorflow.load()
    from finetune.experiment import SettingsError

    results = options.run_dir / "results.jsonl"
    for seed in options.seeds:
        done = [line["rho"] for line in read_lines(results) if line["seed"] == seed]
        missing = [rho for rho in dict.fromkeys(options.rhos) if rho not in done]
        try:
            shared = load(dataclasses.replace(common, seed=seed)) if missing else ()
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        claim(options.run_dir, this_sweep)
        for rho in missing:
            experiment = dataclasses.replace(common, rho=rho, seed=seed)
            line = train_once(experiment, *shared, options.run_dir / f"rho{rho!r}-seed{seed}")
            append_line(results, line)
            print(f"\n{table(read_lines(results))}\n", flush=True)
    print(table(read_lines(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
