"""What a run was, from the `config.gin` that T5X leaves in its folder."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import gin_text
from .gin_text import ending, value
from .tasks import SAMPLED, Sampling, sampling

BASELINE = "baseline"
SAM = "SAM"

SINGLE = "single tasks"
MIXTURE = "a mixture"

# `SharpnessAwareTrainer`'s own, which a config need not say.
_DEFAULTS = {"rho": 0.15, "ascent_fraction": 0.25, "m": 1, "m_sharpness": "paper"}
_NOT_SAMS = (
    *("learning_rate_fn", "num_microbatches"),
    *("diagnostics", "weight_metrics_computer"),  # what is logged, not what is trained
)

_CHECKPOINT = re.compile(r"/?checkpoint_(\d+)/?$")
_MODEL = re.compile(r"(?:^|/)(mt5|t5_1_1)_(small|base|large|xl|xxl)/")
_SAMPLING = re.compile(r"@[\w./]*\bsampled\(\)")
# What our files define for trainer and sample, and nothing refers to if the parameter was given.
_OUR_MACROS = {
    *("RHO", "ASCENT_FRACTION", "M", "GROUP_AXES", "REDUCTION_DTYPE"),
    *("TASK", "SAMPLING_RATE", "SAMPLING_SEED"),
}
# What `sam.gin` binds besides macros and the trainer.
_OF_SAM_GIN = re.compile(r"/copy\.deepcopy\.x$|/gin_config\.query_parameter\.binding_key$")
# What may differ between runs of one setting.
_INCIDENTAL = re.compile(
    r"(?:^|[./_])(?:seed|dir|diagnostics|weight_metrics_computer)$|^CHECKPOINT_PATH$"
    # Which checkpoints and predictions are kept.
    r"|(?:^|/)(?:KEEP_CHECKPOINTS|CHECKPOINT_PERIOD|JSON_WRITE_N_RESULTS)$"
    r"|(?:^|[./])SaveCheckpointConfig\.|JSONLogger\.write_n_results$"
    # What is logged, and when memory is tidied up.
    r"|Evaluator\.logger_cls$|(?:^|[./])train\.(?:stats_period|gc_period|run_eval_before_training)$"
    # How often the batch is divided for memory, and what changes no more than a seed does.
    r"|(?:^|[./])\w*Trainer\.num_microbatches$"
    r"|(?:^|[./])DatasetConfig\.use_cached$"
    r"|(?:^|[./])(?:USE_HARDWARE_RNG|USE_CACHED_TASKS|EVAL_STEPS|(?:EVALUATOR_)?USE_MEMORY_CACHE)$",
    re.IGNORECASE,
)
# How a model is split over chips: of no account, unless the data shards are SAM's groups.
_OF_THE_MESH = re.compile(
    r"(?:^|[./])PjitPartitioner\.(?:num_partitions|model_parallel_submesh|\w+_mesh_shape)$"
)
# Of `t5x.eval`'s, and of a training's third data set, what the figures depend on.
_EVALUATED_ON = "split", "task_feature_lengths"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run, as far as its config tells.

    Attributes:
      method: `BASELINE`, `SAM`, or `None` where it is not known.
      sam: SAM's settings.
      model: the checkpoint it started from, such as "t5_1_1_base".
      start: the step of that checkpoint, if its name says it.
      mixture: the task or mixture it was trained on, without sampling.
      percent: the share of the training data it was trained on.
      sample_seed: the seed of that sample.
      seed: the seed of the run.
      bindings: everything else in the config of the training that may tell two runs apart, as
        text, macros resolved and sampling left out; empty where it is not known.
      macros: by the name of a binding, the macro that it is bound to.
      trained_in: where the training wrote, as its config or that of `t5x.eval` says.
      is_evaluation: whether `t5x.eval` wrote the config.
      evaluated_on: the split, number of examples and lengths that the figures are of, as text and
        as far as the config tells.
    """

    method: str | None = None
    sam: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str | None = None
    start: int | None = None
    mixture: str | None = None
    percent: float | None = None
    sample_seed: int | None = None
    seed: int | None = None
    bindings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    macros: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    trained_in: str | None = None
    is_evaluation: bool = False
    evaluated_on: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """What runs must have in common to stand side by side.

    Attributes:
      model: such as "t5_1_1_base", or "" where it is not known.
      percent: the share of the training data.
      trained_on: `MIXTURE` or `SINGLE`.
    """

    model: str
    percent: float
    trained_on: str

    def __str__(self) -> str:
        """Return it as the title of a table."""
        model = self.model or "unknown model"
        return f"{model}, {self.percent:g}% of the training data, trained on {self.trained_on}"


def read_settings(directory: Path, warn: Callable[[str], None]) -> Settings:
    """Return the settings of the run in a folder: none of them if it has no `config.gin`."""
    bindings = setting = gin_text.read(directory, warn)
    checkpoint = value(bindings, "CHECKPOINT_PATH")
    trained_in = value(bindings, "MODEL_DIR")
    is_evaluation = not ending(bindings, "trainer_cls") and isinstance(checkpoint, str)
    evaluated_on = _evaluated_on(gin_text.resolved(bindings), is_evaluation)
    if is_evaluation:
        # `t5x.eval` wrote this one; how the model was trained is told where its checkpoint lies.
        trained_in, training = _training_of(checkpoint, warn)
        bindings = {**bindings, **training}
        setting = training
    method, sam = _method(bindings)
    mixture, sample = sampling(str(value(bindings, "MIXTURE_OR_TASK_NAME") or ""))
    if mixture.startswith("@"):  # `sam_optax.tasks.sampled`, which names it in the process alone
        mixture, sample = _sampled(bindings)
    seed = value(bindings, "RANDOM_SEED")
    by_groups = bool(sam.get("group_axes") or sam.get("data_shards"))
    macros, start = gin_text.macros(setting), _start(setting)
    setting = _without_sampling(gin_text.resolved(setting), mixture)
    if method in (BASELINE, SAM):
        setting = _without_sam(setting)
    return Settings(
        method=method,
        sam=sam,
        model=_model(bindings),
        start=start,
        mixture=mixture or None,
        percent=sample.percent,
        sample_seed=sample.seed,
        seed=seed if isinstance(seed, int) else None,
        bindings={
            name: text
            for name, text in setting.items()
            if not _INCIDENTAL.search(name) and not _INCIDENTAL.search(macros.get(name, ""))
            if by_groups or not _OF_THE_MESH.search(name)
        },
        macros=macros,
        trained_in=trained_in.rstrip("/") if isinstance(trained_in, str) else None,
        is_evaluation=is_evaluation,
        evaluated_on=evaluated_on,
    )


def _evaluated_on(bindings: Mapping[str, str], is_evaluation: bool) -> dict[str, str]:
    if not bindings:
        return {}
    data = "utils.DatasetConfig" if is_evaluation else "infer_eval/utils.DatasetConfig"
    told = {name: bindings.get(f"{data}.{name}") for name in _EVALUATED_ON}
    limits = [bindings[name] for name in ending(bindings, "Evaluator.num_examples")]
    told["num_examples"] = limits[-1] if limits else "None"
    return {name: text for name, text in told.items() if text is not None}


def _training_of(checkpoint: str, warn: Callable[[str], None]) -> tuple[str, dict[str, str]]:
    """Return the folder of the training that a checkpoint is of, and what its config binds."""
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        bindings = gin_text.read(folder, warn)
        if bindings:
            return str(folder), bindings
    return _CHECKPOINT.sub("", checkpoint), {}


def _method(bindings: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    trainers = [str(value(bindings, name)) for name in ending(bindings, "trainer_cls")]
    if not trainers:
        return None, {}
    scope, _, trainer = trainers[-1].removeprefix("@").rpartition("/")
    trainer = trainer.rpartition(".")[2]
    if trainer != "SharpnessAwareTrainer":
        return (BASELINE if trainer == "Trainer" else trainer), {}
    bound = {
        name.rpartition(".")[2]: value(bindings, name)
        for name in sorted(bindings, key=lambda name: "/" in name)  # a scope's own count last
        if "SharpnessAwareTrainer." in name and name.rpartition("/")[0] in ("", scope)
    }
    sam = {k: v for k, v in {**_DEFAULTS, **bound}.items() if k not in _NOT_SAMS and v is not None}
    if sam.get("rho") == 0:
        return BASELINE, {}  # the plain step
    if sam.get("m") == 1:
        sam.pop("m_sharpness", None)
    if sam.get("ascent_steps") == 1:
        sam.pop("ascent_steps")
    return SAM, sam


def _without_sam(bindings: Mapping[str, str]) -> dict[str, str]:
    """Return the bindings with which T5X's own trainer does what SAM's does with rho = 0."""
    own = {x for x in bindings if "SharpnessAwareTrainer." in x or _OF_SAM_GIN.search(x)}
    kept = {name: text for name, text in bindings.items() if name not in own}
    if any("SharpnessAwareTrainer" in bindings[name] for name in ending(bindings, "trainer_cls")):
        for name in ending(bindings, "SharpnessAwareTrainer.learning_rate_fn"):
            if "copy.deepcopy" not in bindings[name]:  # not what is bound to T5X's trainer
                kept["trainer.Trainer.learning_rate_fn"] = bindings[name]
    for name in ending(kept, "trainer_cls"):
        kept[name] = "@trainer.Trainer"
    return kept


def _without_sampling(bindings: Mapping[str, str], mixture: str) -> dict[str, str]:
    """Return the bindings with which the same is trained on the whole of the data."""
    return {
        name: SAMPLED.sub("", _SAMPLING.sub(lambda _: repr(mixture), text))
        for name, text in bindings.items()
        if name not in _OUR_MACROS and not re.search(r"(?:^|[./])sampled\.\w+$", name)
    }


def _model(bindings: Mapping[str, str]) -> str | None:
    path = value(bindings, "INITIAL_CHECKPOINT_PATH")
    if not isinstance(path, str):
        return None
    known = _MODEL.search(path + "/")
    return "_".join(known.groups()) if known else None


def _start(bindings: Mapping[str, str]) -> int | None:
    """Return the step that the run starts from, 0 of random weights, or `None` if not known."""
    names = ("INITIAL_CHECKPOINT_PATH", *ending(bindings, "RestoreCheckpointConfig.path"))
    paths = [path for path in (value(bindings, name) for name in names) if isinstance(path, str)]
    for path in paths:
        if step := _CHECKPOINT.search(path):
            return int(step[1])
    return None if paths or not bindings else 0


def _sampled(bindings: Mapping[str, str]) -> tuple[str, Sampling]:
    """Return the name and the sample that `sam_optax.tasks.sampled` is given."""
    given = {
        parameter: value(bindings, name)
        for parameter in ("name", "rate", "seed")
        for name in ending(bindings, f"sampled.{parameter}")
    }
    name, rate, seed = given.get("name"), given.get("rate", 1), given.get("seed", 0)
    known = isinstance(rate, int | float) and isinstance(seed, int)
    return str(name or ""), Sampling(round(100 * rate, 4), seed) if known else Sampling()


def method_name(settings: Settings) -> str | None:
    """Return the method with SAM's settings that are not the default, and rho.

    >>> method_name(Settings(SAM, {"rho": 0.15, "ascent_fraction": 0.25, "m": 4}))
    'SAM rho=0.15 m=4'
    """
    if settings.method != SAM:
        return settings.method
    told = [
        f"{name}={given:g}" if isinstance(given, float) else f"{name}={given}"
        for name, given in settings.sam.items()
        if name == "rho" or given != _DEFAULTS.get(name)
    ]
    return " ".join((SAM, *told))
