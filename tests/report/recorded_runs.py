"""Run folders as T5X leaves them, written by SeqIO's own loggers."""

import os
import warnings

CONFIG = r"""
from __gin__ import dynamic_registration
import __main__ as train_script
from sam_optax import t5x_trainer

# Macros:
# ==============================================================================
BATCH_SIZE = {batch_size}
INITIAL_CHECKPOINT_PATH = \
    'gs://t5-data/pretrained_models/t5x/{model}/checkpoint_1000000'
MIXTURE_OR_TASK_NAME = '{mixture}'
MODEL_DIR = '{directory}'
RANDOM_SEED = {seed}
RHO = {rho}

# Parameters for train/utils.DatasetConfig:
# ==============================================================================
train/utils.DatasetConfig.batch_size = %BATCH_SIZE
train/utils.DatasetConfig.seed = {seed}

# Parameters for trainer.Trainer:
# ==============================================================================
trainer.Trainer.learning_rate_fn = @utils.create_learning_rate_scheduler()
trainer.Trainer.num_microbatches = None

# Parameters for t5x_trainer.SharpnessAwareTrainer:
# ==============================================================================
t5x_trainer.SharpnessAwareTrainer.learning_rate_fn = \
    @learning_rate_fn/copy.deepcopy()
t5x_trainer.SharpnessAwareTrainer.num_microbatches = \
    @num_microbatches/copy.deepcopy()
t5x_trainer.SharpnessAwareTrainer.rho = %RHO
{more}
# Parameters for train_script.train:
# ==============================================================================
train_script.train.model_dir = %MODEL_DIR
train_script.train.trainer_cls = {trainer}
"""


def write_config(directory, rho=None, model="t5_1_1_base", mixture="super_glue", **settings):
    """Write the config of a baseline, or of SAM with a rho."""
    trainer = "@trainer.Trainer" if rho is None else "@t5x_trainer.SharpnessAwareTrainer"
    given = {"batch_size": 128, "seed": 0, "more": "", **settings}
    text = CONFIG.format(
        rho=rho, trainer=trainer, model=model, mixture=mixture, directory=directory, **given
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.gin").write_text(text)


def write_evaluation_config(directory, checkpoint, more=""):
    """Write the config that `t5x.eval` leaves."""
    directory.mkdir(parents=True, exist_ok=True)
    text = f"CHECKPOINT_PATH = \\\n    '{checkpoint}'\nMIXTURE_OR_TASK_NAME = 'cbqa_trivia_qa'\n"
    (directory / "config.gin").write_text(f"{text}utils.DatasetConfig.batch_size = 32\n{more}")
    return directory


def write_scores(directory, scores, loggers=("JSONLogger", "TensorBoardLogger")):
    """Write {task: {step: {metric: value}}} as SeqIO's evaluator does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties' about themselves
        import seqio
    evaluations = directory / "inference_eval"
    evaluations.mkdir(parents=True, exist_ok=True)
    for name in loggers:
        logger = getattr(seqio, name)(str(evaluations))
        for task, steps in scores.items():
            for step, metrics in steps.items():
                scalars = {key: seqio.metrics.Scalar(value) for key, value in metrics.items()}
                logger(task, step, scalars, None, None, None)
    return directory


def make_run(directory, scores, rho=None, loggers=("JSONLogger",), **settings):
    """Write a run: its config and its scores."""
    write_config(directory, rho, **settings)
    return write_scores(directory, scores, loggers)
