"""The loss around the solutions of the study, with SAM and without.

  python benchmarks/landscapes.py         # 10 minutes on two cores

Trains the base run of `paper_questions.py` for some seeds, each plain and at the rho that the study
chose. Around the last parameters: the loss on training and on test words along the top Hessian
eigenvector (of the training words) and along one random direction, and for the first seed over the
plane of the two top eigenvectors. `plots.py` draws `landscapes.svg` from what this saves.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

import paper_questions  # noqa: E402
from study import runs, summary  # noqa: E402

RANGES = {"top eigenvector": 2.0, "random direction": 20.0}


def around(run: runs.Run, setup: runs.Setup, work_dir: Path, points: int, plane: bool) -> dict:
    """Train, and return the losses around the solution."""
    from study import training

    from sam_optax import sharpness

    params, words = training.solution(run, setup, work_dir)
    loss_fn = training.plain_loss(setup)
    top = sharpness.hessian_eigenpairs(loss_fn, params, [words["training"]], k=2, max_steps=40)
    directions = {
        "top eigenvector": top.vectors[0],
        "random direction": sharpness.random_direction(params, seed=run.seed),
    }
    lines = {name: np.linspace(-far, far, points) for name, far in RANGES.items()}

    def along(name: str, batch: Any) -> list[float]:
        values = sharpness.loss_along(loss_fn, params, [batch], directions[name], lines[name])
        return np.asarray(values).round(5).tolist()

    found: dict[str, Any] = {
        "seed": run.seed,
        "rho": run.rho,
        "eigenvalues": np.asarray(top.values).tolist(),
        "distances": {name: line.round(5).tolist() for name, line in lines.items()},
        "along": {name: {on: along(name, words[on]) for on in words} for name in directions},
    }
    if plane:
        first, second = top.vectors
        line = lines["top eigenvector"]
        losses = sharpness.loss_along(
            loss_fn, params, [words["training"]], first, line, across=second
        )
        found["plane"] = np.asarray(losses).round(5).tolist()
    return found


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=25, help="along a line")
    parser.add_argument("--json", type=Path, default=BENCHMARKS / "results" / "landscapes.json")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper_questions"))
    parser.add_argument("--smoke", action="store_true", help="a tiny setup; figures mean nothing")
    options = parser.parse_args()
    setup = runs.SMOKE if options.smoke else runs.Setup()
    # Of the study beside the results, if it is there, and not of the one in this repository.
    study = paper_questions.load(options.json.with_name(paper_questions.RESULTS.name), setup)
    study = study or paper_questions.load(paper_questions.RESULTS, runs.Setup())
    rho = summary.chosen_rho(study.values())
    found = []
    for seed in range(options.seeds):
        for run in (runs.Run(seed), runs.Run(seed, rho=rho)):
            found.append(around(run, setup, options.work_dir, options.points, plane=seed == 0))
            print(f"seed {seed}, rho {run.rho}: eigenvalues {found[-1]['eigenvalues']}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
