"""What is trained: the settings that all runs share, and the runs that answer each question."""

import dataclasses
import json
from collections.abc import Iterable

RHOS = (0.01, 0.05, 0.1, 0.2, 0.4)
ASCENT_FRACTIONS = (1 / 16, 3 / 16, 1 / 4, 1 / 2, 1.0)
LARGER_RHOS = (0.8,)
"""Beyond what the paper tried. No other panel uses them, whatever they give."""
GROUPS = {"paper": (1, 2, 4), "foret": (2, 4, 8)}
"""Numbers of groups by `m_sharpness`; `group_axes` on as many shards computes what "foret" does."""
DATA_FRACTIONS = (0.01, 0.02, 0.05, 0.2, 0.8)
TASKS = (("cmudict",), ("wordnet",), ("cmudict", "wordnet"))
SHARES = {"cmudict": 1, "wordnet": 5}
"""Times `Run.data_fraction`: there are a fifth as many definitions as words."""
LENGTHS = {0.02: 2}
"""Data fractions, and the length with which each word is seen as often as in the base setting."""
COST = 1.25
"""Of a step of SAM's with the default ascent fraction, in plain steps."""
DROPOUT_RATES = (0.2, 0.3)
"""Other means against overfitting; the setup has 0.1, as the paper."""
SEEDS = {"fine-tuning": range(10), "fine-tuning, more of plain": range(5, 10)}
"""Of the panels whose seeds are not the first five."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not change within a study."""

    steps: int = 1500
    pretraining_steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 0.01
    eval_every: int = 150
    eval_examples: int = 512
    test_examples: int = 2048
    sharpness_examples: int = 512
    d_model: int = 128
    d_ff: int = 256
    num_heads: int = 4
    num_layers: int = 2
    dropout_rate: float = 0.1


SMOKE = Setup(
    steps=4,
    pretraining_steps=4,
    eval_every=2,
    eval_examples=32,
    test_examples=32,
    sharpness_examples=32,
    d_model=16,
    d_ff=16,
    num_layers=1,
)
"""For a test that it runs: its figures mean nothing."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    seed: int
    tasks: tuple[str, ...] = ("cmudict",)
    data_fraction: float = 0.01
    rho: float = 0.0  # 0 is training without SAM
    ascent_fraction: float = 0.25
    m: int = 1
    m_sharpness: str = "paper"
    pretrained: bool = False
    length: float = 1  # times the steps of the setup, with as many evaluations
    dropout_rate: float | None = None  # `None` is the setup's

    def __post_init__(self):
        """Takes the tasks of a JSON file, a list."""
        object.__setattr__(self, "tasks", tuple(self.tasks))

    @property
    def measures_sharpness(self) -> bool:
        """Whether the solution's sharpness is wanted: where nothing but rho differs."""
        return self == Run(self.seed, rho=self.rho)

    def own(self, setup: Setup) -> Setup:
        """The setup that this run is trained with."""
        return dataclasses.replace(
            setup,
            steps=round(self.length * setup.steps),
            eval_every=round(self.length * setup.eval_every),
            dropout_rate=setup.dropout_rate if self.dropout_rate is None else self.dropout_rate,
        )

    def with_rho(self, rho: float) -> "Run":
        """The same run with SAM."""
        return dataclasses.replace(self, rho=rho)


def _with_most_groups(run: Run) -> Run:
    return dataclasses.replace(run, m=GROUPS["foret"][-1], m_sharpness="foret")


def key(run: Run, setup: Setup) -> str:
    """Names a run and its setup in the file of results."""
    return json.dumps([dataclasses.asdict(run), dataclasses.asdict(setup)], sort_keys=True)


def rho_panel(seeds: Iterable[int], rhos: Iterable[float] = RHOS) -> list[Run]:
    """Figure 2's first panel; the rho of everything else is chosen from it."""
    return [Run(seed, rho=rho) for seed in seeds for rho in (0.0, *rhos)]


def panels(seeds: Iterable[int], rho: float) -> dict[str, list[Run]]:
    """The other questions, each with its runs, at the rho chosen on validation words."""
    seeds = list(seeds)

    def paired(runs: Iterable[Run]) -> list[Run]:
        return [way for run in runs for way in (run, run.with_rho(rho))]

    return {
        "ascent fraction": [
            Run(seed, rho=rho, ascent_fraction=a) for a in ASCENT_FRACTIONS for seed in seeds
        ],
        "m": [
            Run(seed, rho=rho, m=m, m_sharpness=form)
            for form, numbers in GROUPS.items()
            for m in numbers
            for seed in seeds
        ],
        "groups elsewhere": [
            run
            for seed in seeds
            for elsewhere in (Run(seed, tasks=("wordnet",)), Run(seed, data_fraction=0.05))
            for run in (elsewhere, _with_most_groups(elsewhere.with_rho(rho)))
        ],
        "larger rho": [Run(seed, rho=larger) for larger in LARGER_RHOS for seed in seeds],
        "data fraction": paired(
            Run(seed, data_fraction=fraction) for fraction in DATA_FRACTIONS for seed in seeds
        ),
        "length": paired(
            Run(seed, data_fraction=fraction, length=length)
            for fraction, length in LENGTHS.items()
            for seed in seeds
        ),
        "plain at SAM's cost": [Run(seed, length=COST) for seed in seeds],
        "dropout": [
            *paired(Run(seed, dropout_rate=rate) for rate in DROPOUT_RATES for seed in seeds),
            *(
                _with_most_groups(Run(seed, rho=rho, dropout_rate=DROPOUT_RATES[0]))
                for seed in seeds
            ),
        ],
        "fine-tuning": [
            way
            for seed in seeds
            for plain in (Run(seed, pretrained=True),)
            for way in (plain, plain.with_rho(rho), _with_most_groups(plain.with_rho(rho)))
        ],
        "fine-tuning, more of plain": [
            way
            for seed in seeds
            for wider in (Run(seed, pretrained=True, dropout_rate=DROPOUT_RATES[0]),)
            for way in (Run(seed, pretrained=True, length=COST), wider, wider.with_rho(rho))
        ],
        "mixture": paired(Run(seed, tasks=tasks) for tasks in TASKS for seed in seeds),
    }
