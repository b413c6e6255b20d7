"""The gin files for T5X: their text, and, where T5X is installed, what T5X makes of them.

T5X binds `__main__.train`, so this file is also the program that resolves configs, in a process of
its own: `python test_configs.py JOBS RESULTS`.
"""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gin", reason="gin is not installed (pip install gin-config)")

from gin import config_parser

from sam_optax.gin_path import gin_path

CONFIGS = gin_path()
README = CONFIGS / "README.md"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.gin"))
# Without T5X, `t5x` is this folder, a namespace package without an origin.
_T5X = importlib.util.find_spec("t5x")
needs_t5x = pytest.mark.skipif(
    _T5X is None or _T5X.origin is None,
    reason="T5X is not installed (t5x_configs/README.md says how)",
)

# The paper, once more and apart from the files.
SIZES = ("small", "base", "large", "xl")
FAMILIES = ("t5_1_1", "mt5")
MODELS = [f"{family}_{size}" for family in FAMILIES for size in SIZES]
TASKS = {
    "super_glue": ("super_glue_v102_proportional", 512, 62, 0.1, 250_000, 1000),
    "glue": ("glue_v200_proportional", 512, 62, 0.1, 250_000, 1000),
    "cbqa": ("cbqa_proportional", 38, 18, 0.05, 20_000, 200),
    "cbqa_natural_questions": ("cbqa_natural_questions", 38, 18, 0.05, 20_000, 200),
    "cbqa_web_questions": ("cbqa_web_questions", 38, 18, 0.05, 20_000, 200),
    "cbqa_trivia_qa": ("cbqa_trivia_qa", 38, 18, 0.05, 20_000, 200),
    "tydiqa_goldp": ("tydiqa_goldp", 1024, 512, 0.1, 20_000, 200),
}
RHO = dict.fromkeys(MODELS, 0.15) | {
    "t5_1_1_small": 0.05,
    "mt5_small": 0.02,
    "mt5_base": 0.02,
    "mt5_large": 0.02,
    "mt5_xl": 0.05,
}


def paper_checkpoint(model):
    return f"gs://t5-data/pretrained_models/t5x/{model}/checkpoint_1000000"


def includes(*names):
    return [f"--gin_file={name}.gin" for name in names]


# --- The text of the files: no T5X needed -------------------------------------------------------


class AsText(config_parser.ParserDelegate):
    """References stay text."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}" + ("()" if evaluate else "")

    def macro(self, macro_name):
        return f"%{macro_name}"


def statements(name):
    return list(config_parser.ConfigParser((CONFIGS / name).read_text(), AsText()))


def macros(name):
    """Return the macros that a file and what it includes of ours leave behind."""
    found = {}
    for statement in statements(name):
        if isinstance(statement, config_parser.IncludeStatement):
            if not statement.filename.startswith("t5x/"):
                found |= macros(statement.filename)
        elif isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
            found[statement.selector] = statement.value
    return found


def header(name):
    text = (CONFIGS / name).read_text()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.split("\n")))


def test_the_files_are_those_of_the_paper():
    assert [f"models/{m}.gin" in FILES for m in MODELS] == [True] * len(MODELS)
    tasks = [name for name in FILES if name.startswith("tasks/")]
    assert tasks == sorted(f"tasks/{task}.gin" for task in TASKS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_and_its_includes_exist(name):
    for statement in statements(name):
        if isinstance(statement, config_parser.IncludeStatement):
            assert statement.filename.startswith("t5x/") or statement.filename in FILES


@pytest.mark.parametrize("name", FILES)
def test_a_header_says_what_must_and_what_may_be_set(name):
    text = (CONFIGS / name).read_text()
    assert "Must be set:" in header(name) and "May be set:" in header(name)
    assert max(map(len, text.split("\n"))) <= 100
    must, _, may = header(name).partition("Must be set:")[2].partition("May be set:")
    for statement in statements(name):
        if isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
            if statement.value == "%gin.REQUIRED":
                assert statement.selector in must
            elif name in ("sam.gin", "sampled.gin", "models/paper_finetune.gin"):
                internal = ("TASK", "MIXTURE_OR_TASK_NAME")
                assert statement.selector in may or statement.selector in internal


@pytest.mark.parametrize("name", FILES)
def test_what_the_model_would_undo_asks_for_the_model_first(name):
    mine = [s for s in statements(name) if isinstance(s, config_parser.IncludeStatement)]
    guarded = ("model_comes_first.gin", "tasks/cbqa.gin", "sam.gin")
    if name.startswith(("tasks/", "ablations/", "sam")):
        assert mine[0].filename in guarded


@pytest.mark.parametrize("name", ["sam", "sampled", "ablations/rho", "tasks/glue", "tasks/cbqa"])
def test_before_the_model_it_is_an_error(name):
    """In a process that has not named T5X's trainer, and needs no T5X to find that out."""
    stderr = stderr_of_parsing(f"gin.parse_config_file('{name}.gin')")
    assert "No configurable matching 't5x.trainer.Trainer'" in stderr
    assert "model_comes_first.gin" in stderr


@needs_t5x
@pytest.mark.parametrize("name", ["sam", "tasks/cbqa"])
def test_after_overrides_but_before_the_model_it_is_an_error(name):
    mine = """
from __gin__ import dynamic_registration
from t5x import trainer
from t5x import utils
trainer.Trainer.num_microbatches = 4
utils.SaveCheckpointConfig.keep = 1
train/utils.DatasetConfig.seed = 0
"""
    stderr = stderr_of_parsing(
        f"import t5x.train; gin.parse_config({mine!r}); gin.parse_config_file('{name}.gin')"
    )
    assert "No configurable matching 't5x.utils.RestoreCheckpointConfig'" in stderr


def stderr_of_parsing(statements):
    """What Gin says in a process of its own, where it fails."""
    path = f"import importlib.util, gin; gin.add_config_file_search_path({str(CONFIGS)!r}); "
    run = subprocess.run([sys.executable, "-c", path + statements], capture_output=True, text=True)
    assert run.returncode != 0
    return run.stderr


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_papers_settings(task):
    name, inputs, targets, dropout, steps, period = TASKS[task]
    found = macros(f"tasks/{task}.gin")
    assert found["TASK"] == name
    assert found["TASK_FEATURE_LENGTHS"] == {"inputs": inputs, "targets": targets}
    assert found["DROPOUT_RATE"] == dropout
    assert found["TRAIN_STEPS"] == 1_000_000 + steps
    assert found["EVAL_PERIOD"] == period


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_its_public_checkpoint_and_its_rho(model):
    found = macros(f"models/{model}.gin")
    assert found["INITIAL_CHECKPOINT_PATH"] == paper_checkpoint(model)
    assert f"RHO for it is {RHO[model]}," in header(f"models/{model}.gin")


def test_sam_has_the_papers_defaults():
    found = macros("sam.gin")
    assert (found["RHO"], found["ASCENT_FRACTION"], found["M"]) == (0.15, 0.25, 1)


def test_gin_path_as_a_command_needs_nothing_but_the_library():
    code = (
        "import runpy, sys; runpy.run_module('sam_optax.gin_path', run_name='__main__'); "
        "assert not {'t5x', 'flax', 'gin', 'seqio', 'tensorflow'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{CONFIGS}\n"


def test_gin_path_says_when_the_files_are_not_there(tmp_path):
    alone = tmp_path / "gin_path.py"
    alone.write_text((CONFIGS.parent / "sam_optax" / "gin_path.py").read_text())
    run = subprocess.run([sys.executable, str(alone)], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert f"{tmp_path.parent / 't5x_configs'}, and are not" in run.stderr


# --- The commands of the README -----------------------------------------------------------------

_PYTHON = """#!/bin/bash
case "$2" in
  sam_optax.gin_path) echo "$CONFIGS" ;;
  t5x.train) printf '%s\\t' "${@:3}" >> "$LOG"; echo >> "$LOG" ;;
  sam_optax.report) ;;
  sam_optax.tasks) ;;
  t5x.eval) printf '%s\\t' "${@:3}" >> "$EVALUATIONS"; echo >> "$EVALUATIONS" ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


def blocks():
    """Return the README's shell blocks by the text right before them, installing aside."""
    parts = README.read_text().split("```sh\n")
    for before, after in itertools.pairwise(parts):
        block = after.split("```")[0]
        if "pip install" not in block and "gcloud" not in block:
            yield before.split("```")[-1].strip(), block


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return the runs of T5X that the README's blocks make, by the start of their introduction."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "bin").mkdir()
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").touch()
    (folder / "bin" / "python").write_text(_PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    found, log = {}, folder / "log"
    functions = next(block for _, block in blocks() if "finetune() {" in block)
    for before, block in blocks():
        log.write_text("")
        script = (
            f"set -eu\n{functions}\n{block}\n[ ! -e run.sh ] || {{ bash run.sh; rm run.sh; }}\n"
        )
        env = {"PATH": path, "HOME": str(folder), "LOG": str(log), "CONFIGS": str(CONFIGS)}
        env["EVALUATIONS"] = str(folder / "evaluations")
        run = subprocess.run(
            ["bash", "-c", script], env=env, cwd=folder, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        runs = [line.split("\t")[:-1] for line in log.read_text().splitlines()]
        if runs:
            found[before.split("\n\n")[-1]] = runs
    lines = (folder / "evaluations").read_text().splitlines()
    found["evaluations"] = [line.split("\t")[:-1] for line in lines]
    return found


def test_the_data_of_every_task_are_prepared():
    (names,) = re.findall(r"^python -m sam_optax\.tasks (.*)$", README.read_text(), re.MULTILINE)
    of_the_mixture = {name for name in TASKS if name.startswith("cbqa_")}
    assert {*names.split()} == {task for task, *_ in TASKS.values()} - of_the_mixture


def of_table(commands, start):
    (runs,) = [runs for before, runs in commands.items() if before.startswith(start)]
    return runs


def given(arguments, flag):
    return [a.split("=", 1)[1] for a in arguments if a.startswith(f"--{flag}=")]


@pytest.mark.parametrize(
    ("table", "models", "tasks", "rates"),
    [
        ("Table 1,", MODELS[:4], ["super_glue"], [None]),
        ("Table 2,", MODELS[:4], ["glue"], [None]),
        ("Tables 3 and 8,", MODELS[4:], ["tydiqa_goldp"], [None]),
        ("Table 4,", MODELS[:4], ["cbqa"], [None]),
        ("Table 5,", MODELS[:4], list(TASKS)[3:6], [None]),
        ("Tables 6 and 7,", MODELS[:4], ["super_glue", "cbqa"], ["0.05"]),
        ("Figure 1,", MODELS[:2], ["cbqa"], ["0.02", "0.05", "0.1", "0.2", "0.4", "0.6", "0.8"]),
    ],
)
def test_every_table_has_its_runs_with_and_without_sam(commands, table, models, tasks, rates):
    expected = []
    for model, task, rate in itertools.product(models, tasks, rates):
        files = [f"models/{model}.gin", f"tasks/{task}.gin"] + ["sampled.gin"] * (rate is not None)
        expected.append((files, None, rate))
        expected.append(([*files, "sam.gin"], str(RHO[model]), rate))
    runs = of_table(commands, table)
    found = [
        (
            given(run, "gin_file"),
            (given(run, "gin.RHO") or [None])[0],
            (given(run, "gin.SAMPLING_RATE") or [None])[0],
        )
        for run in runs
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_table_9_has_every_row_and_the_baseline(commands):
    runs = of_table(commands, "Table 9 and Figure 2,")
    assert all(
        given(run, "gin_file")[:2] == ["models/t5_1_1_base.gin", "tasks/super_glue.gin"]
        for run in runs
    )
    rows = [given(run, "gin_file")[2:] for run in runs]
    assert rows.count([]) == 1
    for name, values in {
        "RHO": ["0.02", "0.05", "0.1", "0.15", "0.2", "0.3", "0.4"],
        "ASCENT_FRACTION": [str(a / 128) for a in (8, 24, 32, 64, 128)],
        "M": ["1", "2", "4"],
    }.items():
        assert [value for run in runs for value in given(run, f"gin.{name}")] == values
        assert rows.count([f"ablations/{name.lower()}.gin"]) == len(values)


def test_no_two_runs_share_a_folder(commands):
    tables = [runs for before, runs in commands.items() if before.startswith(("Table", "Figure"))]
    folders = [given(run, "gin.MODEL_DIR")[0] for runs in tables for run in runs]
    twice = {folder for folder in folders if folders.count(folder) > 1}
    assert twice == {"'gs://my-bucket/sam/super_glue/base'"}  # Table 1's, and Table 9's baseline


# --- With T5X -------------------------------------------------------------------------------------

MODEL_DIR = '--gin.MODEL_DIR="/none"'
BASE = [MODEL_DIR, *includes("models/t5_1_1_base", "tasks/super_glue")]
SAM = [*BASE, *includes("sam")]
GRID = {
    (model, task, sam): [
        MODEL_DIR,
        *includes(f"models/{model}", f"tasks/{task}", *["sam"] * sam),
    ]
    for model, task, sam in itertools.product(MODELS, TASKS, (False, True))
}
EVALUATIONS = {
    (model, task): [
        "--gin.CHECKPOINT_PATH='/run/checkpoint_1001000'",
        "--gin.EVAL_OUTPUT_DIR='/none'",
        f"--gin_file=t5x/examples/t5/{'/'.join(model.rsplit('_', 1))}.gin",
        *includes("evaluate_t5_1_1" if model[0] == "t" else "evaluate", f"tasks/{task}"),
    ]
    for model, task in itertools.product(MODELS, TASKS)
}
CASES = {
    "batch and dropout": ["--gin.BATCH_SIZE=16", "--gin.DROPOUT_RATE=0.3"],
    "steps": ["--gin.TRAIN_STEPS=1_000_100", "--gin.EVAL_PERIOD=50", "--gin.EVAL_STEPS=3"],
    "apart": ["--gin.EVAL_PERIOD=50", "--gin.CHECKPOINT_PERIOD=100", "--gin.KEEP_CHECKPOINTS=None"],
    "seeds": ["--gin.RANDOM_SEED=0", "--gin.train/utils.DatasetConfig.seed=3"],
    "checkpoint": ["--gin.INITIAL_CHECKPOINT_PATH='/elsewhere'", "--gin.USE_CACHED_TASKS=True"],
    "unpacked": ["--gin.train/utils.DatasetConfig.pack=False"],
    "own task": ["--gin.MIXTURE_OR_TASK_NAME='glue_v002_proportional'"],
    "microbatches": ["--gin.trainer.Trainer.num_microbatches=4"],
    "learning rate": [
        "--gin.utils.create_learning_rate_scheduler.factors='constant * linear_warmup'",
        "--gin.utils.create_learning_rate_scheduler.base_learning_rate=0.5",
        "--gin.utils.create_learning_rate_scheduler.warmup_steps=2_000_000",
    ],
    "no schedule": [
        "--gin.trainer.Trainer.learning_rate_fn=%LEARNING_RATE",
        "--gin.LEARNING_RATE=7",
    ],
    "partitions": ["--gin.PjitPartitioner.num_partitions=2"],
    "submesh": [
        "--gin.PjitPartitioner.num_partitions=None",
        "--gin.PjitPartitioner.model_parallel_submesh=(2, 2, 1, 1)",
    ],
    "sampled": ["--gin_file=sampled.gin", "--gin.SAMPLING_RATE=0.05"],
    "sampled otherwise": [
        "--gin_file=sampled.gin",
        "--gin.SAMPLING_RATE=0.8",
        "--gin.SAMPLING_SEED=7",
    ],
    "all sampled": ["--gin_file=sampled.gin", "--gin.SAMPLING_RATE=1"],
}
SAM_CASES = {
    "sam's macros": [
        "--gin.RHO=0.3",
        "--gin.ASCENT_FRACTION=0.5",
        "--gin.GROUP_AXES='data'",
        "--gin.REDUCTION_DTYPE='bfloat16'",
    ],
    "sam's others": [
        "--gin.M=2",
        "--gin.SharpnessAwareTrainer.m_sharpness='foret'",
        "--gin.SharpnessAwareTrainer.adversarial_dtype='bfloat16'",
    ],
}
REFUSED = {
    "RHO='0.15'": "rho='0.15' must be a number",
    "RHO=-0.1": "rho=-0.1 must be finite and at least 0",
    "ASCENT_FRACTION=25": "ascent_fraction=25 must be in",
    "M=0": "m=0 must be at least 1",
    "GROUP_AXES=('data', 'data')": "group_axes.* each once",
    "REDUCTION_DTYPE='bf16'": "reduction_dtype='bf16' must be a floating dtype",
    "SharpnessAwareTrainer.diagnostics='no'": "diagnostics='no' must be True or False",
    "SharpnessAwareTrainer.loss_reduction='max'": "loss_reduction='max' must be one of",
    "SharpnessAwareTrainer.perturb=3": "perturb must be a predicate",
    "SharpnessAwareTrainer.ascent_steps=0": "ascent_steps=0 must be at least 1",
}
OTHERS = {
    "no task": [MODEL_DIR, *includes("models/t5_1_1_base")],
    "no folder": BASE[1:],
    "no rate": [*BASE, *includes("sampled")],
    "no rho": [*BASE, *includes("ablations/rho")],
    "no share": [*BASE, *includes("ablations/ascent_fraction")],
    "no m": [*BASE, *includes("ablations/m")],
    "misspelt": [*SAM, "--gin.SharpnessAwareTrainer.roh=1"],
    "any order": [
        *includes("models/t5_1_1_base", "sam", "sampled", "tasks/super_glue"),
        "--gin.SAMPLING_RATE=0.05",
        MODEL_DIR,
    ],
    "in order": [
        *includes("models/t5_1_1_base", "tasks/super_glue", "sampled", "sam"),
        "--gin.SAMPLING_RATE=0.05",
        MODEL_DIR,
    ],
    "t5x's own": [
        "--gin_file=t5x/examples/t5/t5_1_1/examples/base_wmt_finetune.gin",
        "--gin_file=sam.gin",
        MODEL_DIR,
    ],
    "the README's schedule of rho": [*SAM, *includes("readme_0")],
    "the README's metrics of weights": [*SAM, *includes("readme_1")],
    "the README's own task": [MODEL_DIR, *includes("models/t5_1_1_base", "readme_2", "sam")],
}


_GIN = re.compile(r"^```\n(from __gin__.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def resolved(commands, tmp_path_factory):
    """Return a function from the arguments of a run to what T5X resolves them to."""
    jobs = [
        *(BASE, SAM),
        *GRID.values(),
        *([*base, *case] for base in (BASE, SAM) for case in CASES.values()),
        *([*SAM, *case] for case in SAM_CASES.values()),
        *([*SAM, f"--gin.{case}"] for case in REFUSED),
        *OTHERS.values(),
        *EVALUATIONS.values(),
        *itertools.chain(*commands.values()),
    ]
    folder = tmp_path_factory.mktemp("resolved")
    for number, text in enumerate(_GIN.findall(README.read_text())):
        (folder / f"readme_{number}.gin").write_text(text)
    (module,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "my_tasks.py").write_text(module)
    (folder / "jobs").write_text(json.dumps(jobs))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    ours = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    env = os.environ | ours
    run = subprocess.run(
        [sys.executable, __file__, str(folder / "jobs"), str(folder / "results")],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((folder / "results").read_text())
    by_job = {tuple(job): result for job, result in zip(jobs, results, strict=True)}
    return lambda arguments: by_job[tuple(arguments)]


@needs_t5x
@pytest.mark.parametrize("sam", [False, True], ids=["baseline", "sam"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_model_task_and_sam_resolve_to_the_papers_run(resolved, model, task, sam):
    run = resolved(GRID[model, task, sam])
    name, inputs, targets, dropout, steps, period = TASKS[task]
    lengths = {"inputs": inputs, "targets": targets}
    family, _, size = model.rpartition("_")
    assert run["restore"] == {"path": paper_checkpoint(model), "mode": "specific"}
    assert run["save"] == {"period": period, "keep": 3, "save_dataset": False}
    assert (run["total_steps"], run["relative_steps"]) == (1_000_000 + steps, None)
    assert run["eval_period"] == period
    assert run["tasks"] == [name] * 3
    assert run["batch_sizes"] == [128] * 3
    assert run["lengths"] == [lengths, lengths, None]
    assert run["splits"] == ["train", "validation", "validation"]
    assert run["cached"] == [False] * 3 and run["packed"] == [True, True, False]
    assert run["dropout"] == dropout
    assert run["layers"] == {"small": 8, "base": 12, "large": 24, "xl": 24}[size]
    assert run["width"] == {"small": 512, "base": 768, "large": 1024, "xl": 2048}[size]
    assert run["vocabulary_size"] == {"t5_1_1": 32_128, "mt5": 250_112}[family]
    assert run["normalizer"] == {"t5_1_1": 2048 * 114, "mt5": 1024 * 229}[family]
    assert run["optimizer"] == "t5x.adafactor.Adafactor"
    assert (run["learning_rate"], run["num_microbatches"]) == (pytest.approx(1e-3), None)
    assert (run["random_seed"], run["seeds"][0]) == (None, None)
    assert run["model_dir"] == "/none"
    if sam:
        assert run["trainer"] == "sam_optax.t5x_trainer.SharpnessAwareTrainer"
        expected = {"rho": 0.15, "ascent_fraction": 0.25, "m": 1}
        expected |= {"group_axes": None, "reduction_dtype": None}
        assert run["sam"] == expected
    else:
        assert run["trainer"] == "t5x.trainer.Trainer"
        assert run["sam"] is None


@needs_t5x
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_vocabulary_of_the_model_is_the_tasks_or_t5x_says_no(resolved, model, task):
    fits = model.startswith("mt5") == (task == "tydiqa_goldp")
    assert resolved(GRID[model, task, False])["vocabularies_match"] is fits


@needs_t5x
def test_what_is_evaluated(resolved):
    def evaluated(model, task):
        return set(resolved(GRID[model, task, True])["evaluated"])

    assert {f"super_glue_{t}_v102" for t in ("boolq", "cb", "copa", "multirc", "record")} <= (
        evaluated("t5_1_1_base", "super_glue")
    )
    assert evaluated("t5_1_1_base", "cbqa") == {name for name in TASKS if name.startswith("cbqa_")}
    languages = ("en", "ar", "bn", "fi", "id", "ko", "ru", "sw", "te")
    assert evaluated("mt5_base", "tydiqa_goldp") == {f"tydiqa_goldp_{la}" for la in languages}


def changed(resolved, base, case):
    """Return what a case changes of a run."""
    before, after = resolved(base), resolved([*base, *case])
    return {name: after[name] for name in after if after[name] != before[name]}


@needs_t5x
@pytest.mark.parametrize("base", [BASE, SAM], ids=["baseline", "sam"])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("batch and dropout", {"batch_sizes": [16] * 3, "dropout": 0.3}),
        (
            "steps",
            {
                "total_steps": 1_000_100,
                "eval_period": 50,
                "eval_steps": 3,
                "save": {"period": 50, "keep": 3, "save_dataset": False},
            },
        ),
        (
            "apart",
            {"eval_period": 50, "save": {"period": 100, "keep": None, "save_dataset": False}},
        ),
        ("seeds", {"random_seed": 0, "seeds": [3, 42, 42]}),
        (
            "checkpoint",
            {"restore": {"path": "/elsewhere", "mode": "specific"}, "cached": [True] * 3},
        ),
        ("unpacked", {"packed": [False, True, False]}),
        ("microbatches", {"num_microbatches": 4}),
        ("learning rate", {"learning_rate": pytest.approx(0.25)}),
        ("no schedule", {"learning_rate": 7}),
        ("partitions", {"partitions": [2, None]}),
        ("submesh", {"partitions": [None, [2, 2, 1, 1]]}),
        ("all sampled", {}),
    ],
)
def test_an_override_reaches_what_it_is_for_and_nothing_else(resolved, base, case, expected):
    assert changed(resolved, base, CASES[case]) == expected


@needs_t5x
@pytest.mark.parametrize("base", [BASE, SAM], ids=["baseline", "sam"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("own task", "glue_v002_proportional"),
        ("sampled", "super_glue_v102_proportional_at_5pct_seed0"),
        ("sampled otherwise", "super_glue_v102_proportional_at_80pct_seed7"),
    ],
)
def test_another_task_or_sample_is_trained_and_evaluated(resolved, base, case, name):
    change = changed(resolved, base, CASES[case])
    assert change.pop("tasks") == [name] * 3
    assert set(change) == {"evaluated"}


@needs_t5x
def test_sams_macros_and_other_arguments(resolved):
    macros = resolved([*SAM, *SAM_CASES["sam's macros"]])["sam"]
    groups = {"group_axes": "data", "reduction_dtype": "bfloat16"}
    assert macros == {"rho": 0.3, "ascent_fraction": 0.5, "m": 1, **groups}
    others = resolved([*SAM, *SAM_CASES["sam's others"]])["sam"]
    assert others["m"] == 2
    assert (others["m_sharpness"], others["adversarial_dtype"]) == ("foret", "bfloat16")


@needs_t5x
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_when_parsed(resolved, case):
    """Not once the data is there and the checkpoint is read, when T5X makes the trainer."""
    assert re.search(REFUSED[case], resolved([*SAM, f"--gin.{case}"])["error"])


@needs_t5x
def test_parsing_leaves_the_devices_alone():
    """On several hosts T5X calls `jax.distributed.initialize` when gin has parsed everything."""
    program = f"""
import gin, jax, t5x.train
from t5x import gin_utils
from t5x.train import _DEFAULT_GIN_SEARCH_PATHS, train
gin.configurable(train)
paths = [{str(CONFIGS)!r}, *_DEFAULT_GIN_SEARCH_PATHS]
files = "models/t5_1_1_base.gin", "tasks/super_glue.gin", "sam.gin"
schedule = "optax.linear_schedule.init_value=0.", "optax.linear_schedule.end_value=.15"
others = "MODEL_DIR='/none'", "optax.linear_schedule.transition_steps=9"
imports = "from __gin__ import dynamic_registration", "import optax"
imports += ("from sam_optax import t5x_trainer",)
rho = "t5x_trainer.SharpnessAwareTrainer.rho=@optax.linear_schedule()"
gin_utils.parse_gin_flags(paths, files, [*imports, rho, *schedule, *others])
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count(), "devices")
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.stdout.endswith("3 devices\n"), run.stderr[-4000:]


@needs_t5x
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no task", "TASK.* set to `%gin.REQUIRED`|TASK.*REQUIRED"),
        ("no folder", "MODEL_DIR.*REQUIRED"),
        ("no rate", "SAMPLING_RATE.*REQUIRED"),
        ("no rho", "RHO.*REQUIRED"),
        ("no share", "ASCENT_FRACTION.*REQUIRED"),
        ("no m", "M.*REQUIRED"),
        ("misspelt", "roh"),
    ],
)
def test_what_is_missing_is_an_error(resolved, case, message):
    assert re.search(message, resolved(OTHERS[case])["error"])


@needs_t5x
def test_after_the_model_any_order_is_the_same(resolved):
    assert resolved(OTHERS["any order"]) == resolved(OTHERS["in order"])


@needs_t5x
@pytest.mark.parametrize(
    ("case", "setting", "value"),
    [
        ("the README's schedule of rho", "rho", "schedule"),
        ("the README's metrics of weights", "weight_metrics_computer", "WeightMetricsComputer"),
    ],
)
def test_gin_files_of_the_readme_bind_what_they_say(resolved, case, setting, value):
    run = resolved(OTHERS[case])
    assert "error" not in run, run["error"]
    assert value in run["sam"][setting]


@needs_t5x
def test_the_readmes_own_task_resolves(resolved):
    run = resolved(OTHERS["the README's own task"])
    assert run["trainer"] == "sam_optax.t5x_trainer.SharpnessAwareTrainer"
    assert run["tasks"] == ["my_task"] * 3 and run["vocabularies_match"]
    assert run["lengths"][0] == {"inputs": 256, "targets": 16}
    assert (run["total_steps"], run["eval_period"]) == (1_010_000, 500)


@needs_t5x
def test_sam_goes_with_a_config_of_t5x(resolved):
    run = resolved(OTHERS["t5x's own"])
    assert run["trainer"] == "sam_optax.t5x_trainer.SharpnessAwareTrainer"
    assert run["tasks"] == ["wmt_t2t_ende_v003"] * 3
    assert (run["learning_rate"], run["num_microbatches"]) == (pytest.approx(1e-3), None)


@needs_t5x
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_is_that_of_training(resolved, model, task):
    evaluation, training = resolved(EVALUATIONS[model, task]), resolved(GRID[model, task, False])
    assert "error" not in evaluation, evaluation["error"]
    for name in ("evaluated", "layers", "width", "vocabulary_size", "vocabularies_match"):
        assert evaluation[name] == training[name], name
    for name in ("tasks", "lengths", "splits"):  # of training, its losses, and its evaluation
        assert evaluation[name] == training[name][2], name
    assert evaluation["restore"] == {"path": "/run/checkpoint_1001000", "mode": "specific"}


@needs_t5x
def test_the_readmes_evaluation_resolves(resolved, commands):
    (arguments,) = commands["evaluations"]
    assert resolved(arguments)["tasks"] == "super_glue_v102_proportional"
    assert resolved(arguments)["splits"] == "validation"


@needs_t5x
def test_every_command_of_the_readme_resolves(resolved, commands):
    runs = (of for before, of in commands.items() if before != "evaluations")
    for arguments in itertools.chain(*runs):
        run = resolved(arguments)
        assert "error" not in run, run["error"]
        ascends = [f for f in given(arguments, "gin_file") if f.startswith(("sam.", "ablations/"))]
        assert (run["sam"] is not None) == bool(ascends)
        assert run["vocabularies_match"]
        for setting in ("rho", "ascent_fraction", "m"):
            for value in given(arguments, f"gin.{setting.upper()}"):
                assert run["sam"][setting] == float(value)


# --- In the process with T5X ----------------------------------------------------------------------


def resolve(arguments):
    """Return what T5X's train.py would call `train` with, as plain values."""
    import inspect

    import gin

    bound = bindings_of("train", arguments)
    required = [
        p.name for p in inspect.signature(train).parameters.values() if p.default is p.empty
    ]
    assert not set(required) - set(bound), "train lacks arguments"
    model, save = bound["model"], bound["checkpoint_cfg"].save
    data = [bound[f"{name}_dataset_cfg"] for name in ("train", "train_eval", "infer_eval")]
    trainer = bound["trainer_cls"]
    settings = gin.get_bindings(f"{trainer.__module__}.{trainer.__name__}")
    schedule = settings.pop("learning_rate_fn")
    microbatches = settings.pop("num_microbatches")
    return {
        **model_and_evaluation(model, bound["checkpoint_cfg"].restore, data),
        "save": {"period": save.period, "keep": save.keep, "save_dataset": save.save_dataset},
        **{
            name: bound[name]
            for name in (
                "total_steps",
                "relative_steps",
                "eval_period",
                "eval_steps",
                "random_seed",
                "model_dir",
            )
        },
        "tasks": [cfg.mixture_or_task_name for cfg in data],
        "batch_sizes": [cfg.batch_size for cfg in data],
        "lengths": [cfg.task_feature_lengths for cfg in data],
        "splits": [cfg.split for cfg in data],
        "cached": [cfg.use_cached for cfg in data],
        "packed": [cfg.pack for cfg in data],
        "seeds": [cfg.seed for cfg in data],
        "dropout": model.module.config.dropout_rate,
        "normalizer": model._loss_normalizing_factor,
        "optimizer": f"{type(model.optimizer_def).__module__}.{type(model.optimizer_def).__name__}",
        "learning_rate": float(schedule(1_000_000)) if callable(schedule) else schedule,
        "num_microbatches": microbatches,
        "partitions": [
            bound["partitioner"]._num_partitions,
            bound["partitioner"]._model_parallel_submesh,
        ],
        "trainer": f"{trainer.__module__}.{trainer.__name__}",
        "sam": settings if trainer.__name__ == "SharpnessAwareTrainer" else None,
    }


def resolve_evaluation(arguments):
    """Return what T5X's eval.py would call `evaluate` with."""
    bound = bindings_of("evaluate", arguments)
    data = bound["dataset_cfg"]
    return {
        **model_and_evaluation(bound["model"], bound["restore_checkpoint_cfg"], [data]),
        "tasks": data.mixture_or_task_name,
        "lengths": data.task_feature_lengths,
        "splits": data.split,
    }


def bindings_of(program, arguments):
    """Return what is bound of T5X's `train` or `evaluate` by the arguments of a command."""
    import gin
    from t5x import gin_utils

    gin.clear_config()
    arguments = gin_utils.rewrite_gin_args(arguments)
    gin_utils.parse_gin_flags([], given(arguments, "gin_file"), given(arguments, "gin_bindings"))
    return gin.get_bindings(program)


def model_and_evaluation(model, restore, data):
    """Return what both programs have; the last of the data sets is decoded and scored."""
    from t5x import utils

    config = model.module.config
    mixture = utils.seqio.get_mixture_or_task(data[-1].mixture_or_task_name)
    try:
        for cfg in data:
            utils.verify_matching_vocabs(cfg, model)
        match = True
    except Exception:  # its message would load the vocabulary from the network
        match = False
    return {
        "restore": {"path": restore.path, "mode": restore.mode},
        "evaluated": sorted(
            task.name for task in utils.seqio.get_subtasks(mixture) if task.metric_fns
        ),
        "layers": config.num_encoder_layers,
        "width": config.emb_dim,
        "vocabulary_size": config.vocab_size,
        "vocabularies_match": match,
    }


def resolve_or_error(arguments):
    evaluates = any(argument.startswith("--gin_file=evaluate") for argument in arguments)
    try:
        return resolve_evaluation(arguments) if evaluates else resolve(arguments)
    except (ValueError, TypeError) as error:
        return {"error": str(error)}


if __name__ == "__main__":
    import gin
    from t5x.eval import evaluate
    from t5x.train import _DEFAULT_GIN_SEARCH_PATHS, train

    gin.configurable(train)
    gin.configurable(evaluate)
    for path in [str(CONFIGS), *_DEFAULT_GIN_SEARCH_PATHS]:
        gin.add_config_file_search_path(path)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = [resolve_or_error(job) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(results, default=repr))  # functions, by their names
