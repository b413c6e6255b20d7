"""`python -m t5x.train` on the CMUdict task: learns, decodes, evaluates, stops and goes on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.find_spec("t5x")
if spec is None or spec.origin is None:
    pytest.skip("T5X is not installed (t5x_configs/README.md)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TASK = "cmudict_pronunciation_2pct_seed0"


def run(program, folder, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    search = f"{ROOT / 'examples' / 'in_t5x'},{ROOT / 't5x_configs'},{folder.parent}"
    done = subprocess.run(
        [sys.executable, "-m", program, f"--gin_search_paths={search}", *flags],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "examples")},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def t5x_train(folder, steps, *flags):
    settings = {
        "MODEL_DIR": f"'{folder}'",
        "TRAIN_STEPS": steps,
        "EVAL_PERIOD": 30,
        "EVALUATOR_NUM_EXAMPLES": 64,
    }
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    run("t5x.train", folder, "--gin_file=t5x_cmudict.gin", *flags, *bindings)


def metrics(folder, inside="inference_eval"):
    lines = (folder / inside / f"{TASK}-metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def train_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "train"), size_guidance={"tensors": 0}).Reload()
    return {
        tag: {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
        if tag == "loss_per_all_target_tokens" or tag.startswith(("sam/", "learning_rate"))
    }


def test_a_run_learns_and_goes_on_with_and_without_sam(tmp_path):
    folder = tmp_path / "run"
    sam = ("--gin_file=sam.gin", "--gin.RHO=0.05")
    checkpoints = "--gin.utils.SaveCheckpointConfig.period=30"
    t5x_train(folder, 60, *sam, checkpoints, "--gin.DROPOUT_RATE=0.0", "--gin.BATCH_SIZE=32")
    scores = metrics(folder)
    assert sorted(scores) == [30, 60]
    assert scores[60]["phoneme_error_rate"] < scores[30]["phoneme_error_rate"]
    scalars = train_scalars(folder)
    loss = scalars["loss_per_all_target_tokens"]
    assert loss[60] < 0.8 * loss[30]
    assert scalars["sam/realised_perturbation"][60] == pytest.approx(1, abs=1e-3)
    assert scalars["sam/rho"][60] == pytest.approx(0.05)
    operative = (folder / "config.gin").read_text()
    assert "BATCH_SIZE = 32" in operative and "DROPOUT_RATE = 0.0" in operative

    # The checkpoint evaluated by t5x.eval: what the run's own evaluation said.
    model = (ROOT / "examples" / "in_t5x" / "t5x_cmudict.gin").read_text()
    network = model[model.index("VOCABULARY = ") : model.index("MIXTURE_OR_TASK_NAME = ")]
    (tmp_path / "tiny_bytes.gin").write_text(
        "from __gin__ import dynamic_registration\nimport seqio\nfrom finetune import task\n"
        "from t5x.examples.t5 import network\ninclude 't5x/examples/t5/t5_1_1/tiny.gin'\n" + network
    )
    run(
        "t5x.eval",
        tmp_path / "evaluated",
        "--gin_file=tiny_bytes.gin",
        "--gin_file=evaluate.gin",
        f"--gin.TASK='{TASK}'",
        f"--gin.CHECKPOINT_PATH='{folder / 'checkpoint_60'}'",
        f"--gin.EVAL_OUTPUT_DIR='{tmp_path / 'evaluated'}'",
        "--gin.seqio.Evaluator.num_examples=64",
    )
    assert metrics(tmp_path / "evaluated")[60] == pytest.approx(scores[60])

    # On from the checkpoint without SAM, and then with it again, on two micro-batches.
    t5x_train(folder, 90, checkpoints)
    t5x_train(folder, 120, *sam, checkpoints, "--gin.trainer.Trainer.num_microbatches=2")
    assert sorted(metrics(folder)) == [30, 60, 90, 120]
    scalars = train_scalars(folder)
    loss = scalars["loss_per_all_target_tokens"]
    assert sorted(loss) == [30, 60, 90, 120]
    assert sorted(scalars["sam/cosine"]) == [30, 60, 120]
    assert loss[120] < loss[60]
