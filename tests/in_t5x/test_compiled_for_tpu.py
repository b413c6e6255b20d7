"""T5X's real step with groups, compiled for a TPU slice with a model axis."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cost_table
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("plain", "groups = shards, in bf16")


for _module, _how in (("t5x", "t5x_configs/README.md"), ("libtpu", "pip install -e '.[tpu-aot]'")):
    if importlib.util.find_spec(_module) is None:
        pytest.skip(f"{_module} is not installed ({_how})", allow_module_level=True)


def test_groups_reshard_no_parameter_over_the_model_axis(tmp_path):
    results = tmp_path / "cost.json"
    case = ["--sizes", "mini", "--slices", "v5e:4x4, 4 x 4", "--steps", *STEPS]
    ours = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")  # not for this compiler
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "t5x_tpu_cost.py", "--json", results, *case],
        env={k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain, groups = json.loads(results.read_text()).values()
    assert groups["step"] == STEPS[1]
    for kind in ("all-to-all", "collective-permute"):
        assert cost_table.count_of(groups, kind) <= cost_table.count_of(plain, kind)
    over_model = [cost_table.bytes_over(entry, "model") for entry in (plain, groups)]
    assert over_model[1] <= 1.25 * over_model[0]
