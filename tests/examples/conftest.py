"""What the tests of the fine-tuning example share: a tiny setting, and third parties' warnings."""

import dataclasses

import pytest

# Warnings that other packages raise about themselves when the example imports or uses them.
IGNORED = ()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/examples/" in item.path.as_posix():
            for warning in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{warning}"))


@pytest.fixture(scope="session")
def tiny():
    """A setting that trains in a second, with SAM's defaults.

    The shapes are those of `--smoke`, so that its programs and these are compiled once.
    """
    from finetune.gin_config import read_experiment

    return dataclasses.replace(
        read_experiment(["smoke.gin"], []), steps=12, eval_every=4, eval_words=16
    )


@pytest.fixture(scope="session")
def tiny_problem(tiny):
    from finetune.train import Problem

    return Problem.load(tiny)
