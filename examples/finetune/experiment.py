"""Everything a run depends on, as one frozen value that gin fills in."""

import dataclasses
import numbers

import numpy as np

import sam_optax
from finetune.model import T5Config


class SettingsError(ValueError):
    """A setting does not fit the data, in words for the user."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The settings of both runs; `examples/configs/cmudict.gin` says what each means."""

    model: T5Config
    seed: int
    data_fraction: float
    steps: int
    batch_size: int
    learning_rate: float
    eval_every: int
    eval_words: int
    test_words: int
    rho: float
    ascent_fraction: float
    m: int
    sharpness_examples: int
    lanczos_steps: int

    def __post_init__(self):
        """Turns a value of the wrong type or size into an error that names the setting."""
        _check_types(self)
        _check_types(self.model)
        positive = "steps batch_size learning_rate eval_every eval_words test_words m"
        for name in f"{positive} sharpness_examples lanczos_steps".split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, but is {getattr(self, name)}")
        for name in ("data_fraction", "ascent_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], but is {getattr(self, name)}")
        if self.rho < 0 or self.seed < 0:
            raise ValueError(f"rho={self.rho} and seed={self.seed} must not be negative")
        # An error with what would fit, if m groups cannot share the ascent's part of a batch.
        sam_optax.ascent_groups(np.zeros(self.batch_size), self.ascent_fraction, m=self.m)


def _check_types(settings) -> None:
    kinds = {int: numbers.Integral, float: numbers.Real}
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), kinds.get(field.type)
        if kind and (isinstance(value, bool) or not isinstance(value, kind)):
            wanted = "a whole number" if field.type is int else "a number"
            raise TypeError(f"{field.name} must be {wanted}, but is {value!r}")
