"""Runs every benchmark, one after the other, and draws the results. Goes on where it was stopped.

  pip install -e ".[experiments,tpu-aot]" torch transformers
  # Two days on two cores, most of them the TPU compiler's and the study's:
  python benchmarks/run_all.py --results runs/benchmarks
  python benchmarks/run_all.py --results runs/benchmarks --only step_cost device_scaling
  python benchmarks/run_all.py --smoke    # that they run; the figures mean nothing

Without `--results` it goes on from the committed results, and measures what they lack.

What cannot be imported here (PyTorch, libtpu, CUDA's plugin, T5X) is named and left out.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
# A smoke run's programs run a few times: compiling them well takes longer than that saves.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TINY = ["--inputs", "8", "--targets", "8", "--rounds", "1"]


class Benchmark(NamedTuple):
    """How to run a script; `{results}` is the folder of the results."""

    script: str
    options: list[str]
    smoke: list[str]
    needs: tuple[str, ...] = ()
    saves: str = ""  # a script without resume is left out once this is there


BENCHMARKS = {
    "step_cost": Benchmark(
        "step_cost.py",
        ["--grid", "--compilations", "2", "--json", "{results}/step_cost.json"],
        ["--size", "1M", "--steps", "a/b = 1/4", "--json", "{results}/step_cost.json", *TINY],
    ),
    "device_scaling": Benchmark(
        "device_scaling.py",
        ["--json", "{results}/device_scaling.json"],
        ["--devices", "2", "--json", "{results}/device_scaling.json", *TINY],
        saves="device_scaling.json",
    ),
    "torch_sam": Benchmark(
        "torch_sam.py",
        ["--json", "{results}/torch_sam.json"],
        ["--size", "1M", "--batch", "4", "--json", "{results}/torch_sam.json", *TINY],
        needs=("torch", "transformers"),
        saves="torch_sam.json",
    ),
    "low_precision": Benchmark(
        "low_precision.py",
        ["--json", "{results}/low_precision.json"],
        ["--sizes", "1M", "--json", "{results}/low_precision.json"],
        saves="low_precision.json",
    ),
    "paper_questions": Benchmark(
        "paper_questions.py",
        ["--results", "{results}/paper_questions.jsonl"],
        ["--smoke", "--seeds", "2", "--panels", "rho", "--rhos", "0.1", "--workers", "1",
         "--results", "{results}/paper_questions.jsonl"],
        needs=("wn", "scipy"),
    ),
    "landscapes": Benchmark(
        "landscapes.py",
        ["--json", "{results}/landscapes.json"],
        ["--smoke", "--seeds", "1", "--points", "3", "--json", "{results}/landscapes.json"],
        needs=("scipy",),
        saves="landscapes.json",
    ),
    "tpu_cost": Benchmark(
        "tpu_cost.py", ["--json", "{results}/tpu_cost.json"], ["--help"], needs=("libtpu",)
    ),
    "two_slices": Benchmark(
        "two_slices.py",
        ["--json", "{results}/two_slices.json"],
        ["--help"],
        needs=("libtpu",),
        saves="two_slices.json",
    ),
    "gpu_cost": Benchmark(
        "gpu_cost.py",
        ["--json", "{results}/gpu_cost.json"],
        ["--help"],
        needs=("jax_cuda12_plugin",),
    ),
    "t5x_tpu_cost": Benchmark(
        "t5x_tpu_cost.py",
        ["--json", "{results}/t5x_tpu_cost.json"],
        ["--help"],
        needs=("libtpu", "t5x"),
    ),
    "plots": Benchmark("plots.py", ["--results", "{results}"], ["--help"]),
}  # fmt: skip


def run(name: str, results: Path, smoke: bool) -> bool:
    """Run one and tell whether it went well, or could not run here."""
    benchmark = BENCHMARKS[name]
    missing = [need for need in benchmark.needs if importlib.util.find_spec(need) is None]
    if missing:
        print(f"== {name}: left out, {', '.join(missing)} not installed", flush=True)
        return True
    if benchmark.saves and not smoke and (results / benchmark.saves).exists():
        print(f"== {name}: {benchmark.saves} is there already", flush=True)
        return True
    options = benchmark.smoke if smoke else benchmark.options
    command = [sys.executable, str(HERE / benchmark.script)]
    command += [option.format(results=results) for option in options]
    began = time.monotonic()
    print(f"== {name}: {' '.join(command)}", flush=True)
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED}"} if smoke else {}
    code = subprocess.run(command, env=os.environ | flags).returncode
    print(f"== {name}: status {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


def main() -> None:
    """Run them all; the status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="a folder; by default the committed"
    )
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) if options.smoke else options.results
        results.mkdir(parents=True, exist_ok=True)
        failed = [name for name in options.only if not run(name, results, options.smoke)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
