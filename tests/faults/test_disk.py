"""A full disk and damaged files: an error that says how to go on, and doing so ends the same."""

import shutil

import jax.numpy as jnp
import pytest
from finetune.checkpoints import Checkpoints, UnsavedCheckpoint
from finetune_lives import LAST


def assert_ends_like(whole, outcome):
    for key in ("params", "best", "records"):
        assert outcome.get(key) == whole[key], (key, outcome)


def assert_unsaved(outcome, path, why, before):
    assert outcome.get("error") == "UnsavedCheckpoint", outcome
    message = outcome["message"]
    assert f"{path} could not be written" in message
    assert why in message
    assert f"--resume to go on from step {before}, which is intact" in message


def test_full_disk(lives, whole, kills):
    if not lives.has_small_disk:
        pytest.skip("this process may not mount a disk of its own (unshare --mount, tmpfs)")
    checkpoints = lives.folder / "disk" / "run" / "checkpoints"
    # Room for a part of the checkpoint; and none at all, which costs another life.
    for ballast, step in ((200_000, 4), (0, 6))[: 2 if kills >= 20 else 1]:
        outcome = lives(run="disk/run", ballast=ballast)
        assert_unsaved(outcome, checkpoints / str(step), "the disk is full", step - 2)
        last = lives(restore=["disk/run"])["restored"]
        assert last == [[step - 2, whole["saved"][str(step - 2)]]]
    assert_ends_like(whole, lives(run="disk/run"))


def test_checkpoint_that_the_system_refuses_to_write(lives, whole):
    checkpoints = lives.folder / "refused" / "checkpoints"
    outcome = lives(run="refused", largest_file=65536)
    assert_unsaved(outcome, checkpoints / "4", "File too large", 2)
    assert lives(restore=["refused"])["restored"] == [[2, whole["saved"]["2"]]]
    if not lives.has_small_disk:  # else `test_full_disk` goes on
        assert_ends_like(whole, lives(run="refused"))


def test_first_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def save(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", save)
    with pytest.raises(UnsavedCheckpoint, match=r"/2 could not .* bytes are free.*from the start"):
        checkpoints.save(2, {"w": jnp.ones(2)}, {}, keep=set())


def test_the_command_ends_with_the_message(lives):
    outcome = lives(command="command")
    path = lives.folder / "command" / "checkpoints" / "2"
    assert outcome.get("status") == 2, outcome
    assert outcome["stderr"].startswith(f"error: The checkpoint {path} could not be written")
    assert "Traceback" not in outcome["stderr"]


def _arrays(checkpoint):
    """The files that hold the arrays, the largest first."""
    files = [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def _garbage(path):
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "garbage in an array file": lambda c: _garbage(_arrays(c)[0]),
    "a flipped bit": lambda c: _flip_a_bit(_arrays(c)[0]),
    "a truncated array file": lambda c: _arrays(c)[0].write_bytes(b"short"),
    "an empty array file": lambda c: _arrays(c)[0].write_bytes(b""),
    "no array file": lambda c: _arrays(c)[0].unlink(),
    "no manifest": lambda c: (c / "state" / "manifest.ocdbt").unlink(),
    "no tree of the state": lambda c: (c / "state" / "_METADATA").unlink(),
    "garbage in the tree": lambda c: _garbage(c / "state" / "_METADATA"),
    "no state": lambda c: shutil.rmtree(c / "state"),
    "no curve": lambda c: (c / "progress" / "metadata").unlink(),
    "garbage in the curve": lambda c: _garbage(c / "progress" / "metadata"),
    "nothing": lambda c: [shutil.rmtree(c), c.mkdir()],
}


def test_damaged_checkpoint_is_named_and_the_one_before_it_can_be_resumed(lives, whole):
    best = whole["best"][0]
    assert best < LAST, "the best checkpoint is to be the one before the last"
    runs = [f"damaged{number}" for number in range(len(DAMAGE))]
    for run, damage in zip(runs, DAMAGE.values(), strict=True):
        shutil.copytree(lives.folder / "whole", lives.folder / run)
        damage(lives.folder / run / "checkpoints" / str(LAST))
    for run, name, outcome in zip(runs, DAMAGE, lives(restore=runs)["restored"], strict=True):
        last = lives.folder / run / "checkpoints" / str(LAST)
        assert isinstance(outcome, str), (name, outcome)
        assert f"{last} is damaged" in outcome and "Delete that folder and use --resume" in outcome
        shutil.rmtree(last)
    assert lives(restore=runs)["restored"] == [[best, whole["saved"][str(best)]]] * len(runs)
    assert_ends_like(whole, lives(run=runs[0]))


def test_damaged_best_checkpoint_costs_the_run_and_its_errors_say_so(lives, whole):
    shutil.copytree(lives.folder / "whole", lives.folder / "best")
    checkpoints = lives.folder / "best" / "checkpoints"
    best = checkpoints / str(whole["best"][0])
    _garbage(_arrays(best)[0])
    outcome = lives(run="best")
    assert f"{best} is damaged" in outcome["message"]
    shutil.rmtree(best)
    outcome = lives(run="best")
    assert f"{best} is missing" in outcome["message"]
    assert f"Delete {checkpoints} and use --resume" in outcome["message"]
