"""The paper's questions on real data, at a size that fits a CPU: small T5s, several seeds.

  python benchmarks/paper_questions.py --workers 2
  python benchmarks/paper_questions.py --panels "ascent fraction" m     # these need those of `rho`

Every run that ends is a line of the results file; the same command goes on where it was stopped.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

from study import runs, summary  # noqa: E402

RESULTS = BENCHMARKS / "results" / "paper_questions.jsonl"
REPORT = """# The paper's questions, on small T5s

Written by [`paper_questions.py`](../paper_questions.py) from `paper_questions.jsonl`. {steps} steps
of {batch_size} examples with Adafactor, from random weights unless it says pre-trained. Exact
match, in %, is of the best checkpoint by validation words, on test words. "Against plain" is the
mean difference over seeds, SAM minus plain, ± its standard error; p is that of a paired t test,
not corrected for the number of rows. A lower loss and a higher exact match are better.

![Gain against rho, ascent fraction and m](figure_2.svg)

![Exact match and loss against the share of the words](figure_1.svg)

"""
CONTROLS = """## Against plain training for longer, or with more dropout

On 1% of the words: SAM as in the table above, from the same weights, with the setup's steps and
dropout, minus plain training, over the seeds of both. A step of SAM's is {cost:g} plain ones.

"""
SHARPNESS = """## Sharpness of the solutions

Of the last checkpoints, on training words, without dropout: geometric means over seeds. The rise of
epsilon-sharpness is within a distance of 0.15.

![Sharpness against rho](sharpness.svg)

"""
PANELS = ("rho", *runs.panels([0], 0.1))


def load(results: Path, setup: runs.Setup) -> dict[str, dict]:
    """The finished runs of a setup by their key. A line cut off by a crash is left out."""
    found = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            print(f"{results}: a damaged line is left out: {line[:60]}...", file=sys.stderr)
            continue
        if record["setup"] == dataclasses.asdict(setup):
            found[runs.key(runs.Run(**record["run"]), setup)] = record
    return found


def append(results: Path, record: dict) -> None:
    """Add a finished run, on a line of its own also after one that was cut off."""
    cut_off = results.exists() and not results.read_bytes().endswith(b"\n")
    with results.open("a") as file:
        file.write("\n" * cut_off + json.dumps(record) + "\n")


def do(wanted: list[runs.Run], options: argparse.Namespace, setup: runs.Setup) -> None:
    """Train what is not in the results file yet."""
    done = load(options.results, setup)
    todo = [run for run in dict.fromkeys(wanted) if runs.key(run, setup) not in done]
    if not todo:
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    # A fresh interpreter for each worker: JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        if any(run.pretrained for run in todo):
            seeds = sorted({run.seed for run in todo if run.pretrained})
            pretrain = functools.partial(_pretrain, setup=setup, work_dir=options.work_dir)
            list(pool.map(pretrain, seeds))
        waiting = [pool.submit(_train, run, setup, options.work_dir) for run in todo]
        for number, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            record = future.result()
            append(options.results, record)
            print(f"{number}/{len(todo)} {record['run']}: {record['seconds']:.0f} s", flush=True)


def _pretrain(seed: int, setup: runs.Setup, work_dir: Path) -> None:
    from study import training

    if not training.pretrained_path(seed, setup, work_dir).exists():
        training.pretrain(seed, setup, work_dir)


def _train(run: runs.Run, setup: runs.Setup, work_dir: Path) -> dict:
    import jax
    from study import training

    began = time.time()
    figures = training.train(run, setup, work_dir)
    return {
        "run": dataclasses.asdict(run),
        "setup": dataclasses.asdict(setup),
        "seconds": time.time() - began,
        "jax": jax.__version__,
        **figures,
    }


def main() -> None:
    """Train, then print the tables of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--panels", nargs="*", choices=PANELS, default=PANELS, metavar="PANEL")
    parser.add_argument("--seeds", type=int, help="so many seeds in every panel (default: its own)")
    parser.add_argument("--rhos", type=float, nargs="+", default=runs.RHOS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--results", type=Path, default=BENCHMARKS / "results" / "paper_questions.jsonl"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper_questions"))
    parser.add_argument("--smoke", action="store_true", help="a tiny setup; figures mean nothing")
    options = parser.parse_args()
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1 is needed")

    def seeds_of(panel: str) -> range:
        return range(options.seeds) if options.seeds else runs.SEEDS.get(panel, range(5))

    # Workers share the cores, so none may use them all.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get(
        "XLA_FLAGS", ""
    )
    setup = runs.SMOKE if options.smoke else runs.Setup()
    if "rho" in options.panels:
        do(runs.rho_panel(seeds_of("rho"), options.rhos), options, setup)
    records = load(options.results, setup)
    rho = summary.chosen_rho(records.values())
    others = [panel for panel in options.panels if panel != "rho"]
    if others and rho is None:
        parser.error(f"{options.results} has no runs of the panel `rho`, which chooses rho")
    for panel in others:
        do(runs.panels(seeds_of(panel), rho)[panel], options, setup)
    found = list(load(options.results, setup).values())
    text = f"{REPORT.format(**vars(setup))}{summary.markdown(found, rho)}\n\n"
    text += f"{CONTROLS.format(cost=runs.COST)}{summary.controls_markdown(found, rho)}\n\n"
    text += f"{SHARPNESS}{summary.sharpness_markdown(found)}\n"
    print(text)
    options.results.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
