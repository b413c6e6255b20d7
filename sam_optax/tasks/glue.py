"""GLUE on the version of its data that TensorFlow Datasets still makes.

PyPI's `t5` registers GLUE on version 1.0.0, which TFDS no longer generates ("too old for this
version of TFDS"). Importing this module registers the same tasks on 2.0.0, whose notes tell of one
change, another source for QQP: `glue_cola_v200` for `glue_cola_v002`, and so on, and their mixture
`glue_v200_proportional`, at `t5`'s own rates. It needs `t5`, which `sam_optax.tasks` does not.
"""

from typing import Any

import seqio
import t5.data.mixtures  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the tasks

_OLD, _NEW = ("_v002", ":1.0.0"), ("_v200", ":2.0.0")


def _register_with_new_data(task: Any) -> str:
    name = task.name.replace(_OLD[0], _NEW[0])
    data = task.source.tfds_dataset.name.replace(_OLD[1], _NEW[1])
    splits = task.source._splits or None  # `splits` itself asks for the data
    source = seqio.TfdsDataSource(data, splits=splits)
    seqio.TaskRegistry.add_provider(name, task.replace(name=name, source=source))
    return name


def _register() -> None:
    mixture = seqio.MixtureRegistry.get("glue_v002_proportional")
    rates = mixture.rate_per_task_name
    seqio.MixtureRegistry.add(
        "glue_v200_proportional",
        [(_register_with_new_data(task), rates[task.name]) for task in mixture.tasks],
    )


_register()
