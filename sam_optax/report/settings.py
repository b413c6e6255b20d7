"""What a run was, from the `config.gin` that T5X leaves in its folder."""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .tasks import Sampling, sampling

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

_BINDING = re.compile(r"^([\w./]+) = (.*(?:\n[ \t]+.*)*)", re.MULTILINE)
_MACRO = re.compile(r"%([\w./]+)")
_CHECKPOINT = re.compile(r"/?checkpoint_\d+/?$")
_MODEL = re.compile(r"(?:^|/)(mt5|t5_1_1)_(small|base|large|xl|xxl)/")
# What `sam.gin` binds besides macros and the trainer.
_OF_SAM_GIN = re.compile(r"/copy\.deepcopy\.x$|/gin_config\.query_parameter\.binding_key$")
# What may differ between runs of one setting.
_INCIDENTAL = re.compile(
    r"(?:^|[./_])(?:seed|dir|diagnostics|weight_metrics_computer)$|^CHECKPOINT_PATH$"
    # Which checkpoints and predictions are kept, and how a model is split over chips.
    r"|(?:^|/)(?:KEEP_CHECKPOINTS|CHECKPOINT_PERIOD|JSON_WRITE_N_RESULTS)$"
    r"|(?:^|[./])SaveCheckpointConfig\.|JSONLogger\.write_n_results$"
    r"|(?:^|[./])PjitPartitioner\.(?:num_partitions|model_parallel_submesh)$"
    # How often the batch is divided for memory, and what changes no more than a seed does.
    r"|(?:^|[./])\w*Trainer\.num_microbatches$"
    r"|(?:^|[./])(?:USE_HARDWARE_RNG|USE_CACHED_TASKS|EVAL_STEPS|(?:EVALUATOR_)?USE_MEMORY_CACHE)$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run, as far as its config tells.

    Attributes:
      method: `BASELINE`, `SAM`, or `None` where it is not known.
      sam: SAM's settings.
      model: the checkpoint it started from, such as "t5_1_1_base".
      mixture: the task or mixture it was trained on, without sampling.
      percent: the share of the training data it was trained on.
      sample_seed: the seed of that sample.
      seed: the seed of the run.
      bindings: everything in the config that may tell two runs apart, as text.
      trained_in: where the training wrote, as its config or that of `t5x.eval` says.
      is_evaluation: whether `t5x.eval` wrote the config.
      split: the split that it was evaluated on, where the config says.
    """

    method: str | None = None
    sam: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str | None = None
    mixture: str | None = None
    percent: float | None = None
    sample_seed: int | None = None
    seed: int | None = None
    bindings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trained_in: str | None = None
    is_evaluation: bool = False
    split: str | None = dataclasses.field(default=None, compare=False)


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
    bindings = setting = _read(directory, warn)
    checkpoint = _value(bindings, "CHECKPOINT_PATH")
    trained_in = _value(bindings, "MODEL_DIR")
    is_evaluation = not _ending(bindings, "trainer_cls") and isinstance(checkpoint, str)
    of_evaluation = "utils.DatasetConfig" if is_evaluation else "infer_eval/utils.DatasetConfig"
    split = _value(bindings, f"{of_evaluation}.split")
    if is_evaluation:
        # `t5x.eval` wrote this one; how the model was trained is told where its checkpoint lies.
        trained_in, training = _training_of(checkpoint, warn)
        bindings = {**bindings, **training}
        setting = training or bindings
    method, sam = _method(bindings)
    if method == BASELINE:
        setting = _without_sam(setting)
    mixture, sample = sampling(str(_value(bindings, "MIXTURE_OR_TASK_NAME") or ""))
    if mixture.startswith("@"):  # `sam_optax.tasks.sampled`, which names it in the process alone
        mixture, sample = _sampled(bindings)
    seed = _value(bindings, "RANDOM_SEED")
    return Settings(
        method=method,
        sam=sam,
        model=_model(bindings),
        mixture=mixture or None,
        percent=sample.percent,
        sample_seed=sample.seed,
        seed=seed if isinstance(seed, int) else None,
        bindings={
            name: re.sub(r"_seed\d+", "", value)
            for name, value in setting.items()
            if not _INCIDENTAL.search(name)
        },
        trained_in=trained_in.rstrip("/") if isinstance(trained_in, str) else None,
        is_evaluation=is_evaluation,
        split=split if isinstance(split, str) else None,
    )


def _training_of(checkpoint: str, warn: Callable[[str], None]) -> tuple[str, dict[str, str]]:
    """Return the folder of the training that a checkpoint is of, and what its config binds."""
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        bindings = _read(folder, warn)
        if bindings:
            return str(folder), bindings
    return _CHECKPOINT.sub("", checkpoint), {}


def parse(text: str) -> dict[str, str]:
    r"""Return the bindings of a gin file that gin itself wrote, values as text.

    >>> parse("# Macros:\nRHO = 0.15\nPATH = \\\n    'a/b'\nt5x_trainer.Trainer.rho = %RHO")
    {'RHO': '0.15', 'PATH': "'a/b'", 't5x_trainer.Trainer.rho': '%RHO'}
    """
    unwrapped = re.sub(r"\\\n\s*", "", text)
    return {name: value.strip() for name, value in _BINDING.findall(unwrapped)}


def _read(directory: Path, warn: Callable[[str], None]) -> dict[str, str]:
    file = directory / "config.gin"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn(f"{file}: not readable ({error.strerror}); the run goes by its folder's name.")
        return {}
    bindings = parse(text)
    if not bindings:
        warn(f"{file}: no settings in it; the run goes by its folder's name.")
    elif not text.endswith("\n"):
        warn(f"{file}: ends in the middle of a line; what is cut off of its settings is not known.")
    elif not _ending(bindings, "trainer_cls") and "CHECKPOINT_PATH" not in bindings:
        warn(f"{file}: does not say which trainer it is of; the run goes by its folder's name.")
    return bindings


def _value(bindings: Mapping[str, str], name: str) -> Any:
    """Return a binding's value, through macros; what is no Python literal stays text."""
    text = bindings.get(name)
    for _ in range(len(bindings)):
        if text is None or not text.startswith("%"):
            break
        text = bindings.get(text[1:])
    try:
        return None if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def _ending(bindings: Mapping[str, str], parameter: str) -> list[str]:
    return [name for name in bindings if ("." + name).endswith("." + parameter)]


def _method(bindings: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    trainers = [str(_value(bindings, name)) for name in _ending(bindings, "trainer_cls")]
    if not trainers:
        return None, {}
    trainer = trainers[-1].removeprefix("@").rpartition(".")[2]
    if trainer != "SharpnessAwareTrainer":
        return (BASELINE if trainer == "Trainer" else trainer), {}
    bound = {
        name.rpartition(".")[2]: _value(bindings, name)
        for name in bindings
        if "SharpnessAwareTrainer." in name
    }
    sam = {k: v for k, v in {**_DEFAULTS, **bound}.items() if k not in _NOT_SAMS and v is not None}
    if sam.get("rho") == 0:
        return BASELINE, {}  # the plain step
    if sam.get("m") == 1:
        sam.pop("m_sharpness", None)
    return SAM, sam


def _without_sam(bindings: Mapping[str, str]) -> dict[str, str]:
    """Return the bindings with which T5X's own trainer does what SAM's does with rho = 0."""
    own = {x for x in bindings if "SharpnessAwareTrainer." in x or _OF_SAM_GIN.search(x)}
    kept = {name: value for name, value in bindings.items() if name not in own}
    if any("SharpnessAwareTrainer" in bindings[name] for name in _ending(bindings, "trainer_cls")):
        for name in _ending(bindings, "SharpnessAwareTrainer.learning_rate_fn"):
            if "copy.deepcopy" not in bindings[name]:  # not what is bound to T5X's trainer
                kept["trainer.Trainer.learning_rate_fn"] = bindings[name]
    of_own = " ".join(bindings[name] for name in own)
    for macro in set(_MACRO.findall(of_own)) - set(_MACRO.findall(" ".join(kept.values()))):
        kept.pop(macro, None)
    for name in _ending(kept, "trainer_cls"):
        kept[name] = "@trainer.Trainer"
    return kept


def _model(bindings: Mapping[str, str]) -> str | None:
    path = _value(bindings, "INITIAL_CHECKPOINT_PATH")
    if not isinstance(path, str):
        return None
    known = _MODEL.search(path + "/")
    return "_".join(known.groups()) if known else None


def _sampled(bindings: Mapping[str, str]) -> tuple[str, Sampling]:
    """Return the name and the sample that `sam_optax.tasks.sampled` is given."""
    given = {
        parameter: _value(bindings, name)
        for parameter in ("name", "rate", "seed")
        for name in _ending(bindings, f"sampled.{parameter}")
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
        f"{name}={value}"
        for name, value in settings.sam.items()
        if name == "rho" or value != _DEFAULTS.get(name)
    ]
    return " ".join((SAM, *told))
