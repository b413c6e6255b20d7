"""`python -m t5x.train` on the CMUdict task: learns, decodes, evaluates, stops and goes on."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

spec = importlib.util.find_spec("t5x")
if spec is None or spec.origin is None:
    pytest.skip("T5X is not installed (t5x_configs/README.md)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TASK = "cmudict_pronunciation_2pct_seed0"


def run(program, folder, *flags, hosts=1):
    """Run it, on one host or on several, which here are processes; return what they logged."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    search = f"{ROOT / 'examples' / 'in_t5x'},{ROOT / 't5x_configs'},{folder.parent}"
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(hosts)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", program, f"--gin_search_paths={search}", *flags]
                + ([] if hosts == 1 else [f"--process_index={i}"]),
                env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "examples")},
                cwd=folder.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        texts = [log.seek(0) or log.read() for log in logs]
    assert not any(codes), texts[codes.index(max(codes, key=abs))][-3000:]
    return texts


def t5x_train(folder, steps, *flags, hosts=1):
    settings = {
        "MODEL_DIR": f"'{folder}'",
        "TRAIN_STEPS": steps,
        "EVAL_PERIOD": 30,
        "EVALUATOR_NUM_EXAMPLES": 64,
    }
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    return run("t5x.train", folder, "--gin_file=t5x_cmudict.gin", *flags, *bindings, hosts=hosts)


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


def test_two_hosts(tmp_path):
    """With the flag of the README; on a TPU the others, of address and number, are not needed."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        address = f"localhost:{unused.getsockname()[1]}"
    cluster = ["--multiprocess_gpu", f"--coordinator_address={address}", "--process_count=2"]
    settings = ["--gin_file=sam.gin", "--gin.BATCH_SIZE=32", "--gin.RHO=0.05"]
    checkpoints = "--gin.utils.SaveCheckpointConfig.period=30"
    logs = t5x_train(tmp_path / "two", 30, *settings, checkpoints, *cluster, hosts=2)
    assert all("process_count: 2" in log for log in logs)
    assert (tmp_path / "two" / "checkpoint_30").exists()
    t5x_train(tmp_path / "one", 30, *settings, checkpoints)
    one, two = (train_scalars(tmp_path / name) for name in ("one", "two"))
    assert two["sam/realised_perturbation"][30] == pytest.approx(1, abs=1e-3)
    # The hosts read their own parts of the data, so the batches are others than one host's.
    for name in ("loss_per_all_target_tokens", "sam/descent_grad_norm"):
        assert two[name][30] == pytest.approx(one[name][30], rel=0.1)
    assert sorted(metrics(tmp_path / "two")) == [30]
    # One host goes on from the checkpoint of both.
    t5x_train(tmp_path / "two", 60, *settings, checkpoints)
    assert train_scalars(tmp_path / "two")["sam/cosine"].keys() == {30, 60}
