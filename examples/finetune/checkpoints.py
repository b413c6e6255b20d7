"""Checkpoints of one run, with Orbax: the last one, and the best by validation.

A checkpoint is all a run needs to go on: the train state, and as JSON the curve so far. Orbax
commits it as a whole, so a killed process leaves either all of it or nothing; and as the curve is
inside, the two cannot disagree. A checksum of the arrays is kept as well, as a flipped bit would
otherwise be read back without complaint.
"""

import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

# In the words of the system, as TensorStore's errors have no number.
_DISK_IS_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class CheckpointError(RuntimeError):
    """What went wrong with a checkpoint and how to go on, in words for the user."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read back as it was written."""


class UnsavedCheckpoint(CheckpointError):
    """A checkpoint that could not be written. Those before it are as they were."""


class Checkpoints:
    """The checkpoints in one directory, each known by its step."""

    def __init__(self, directory: Path):
        """Opens the directory, creates it if needed, and clears away half-written checkpoints."""
        # Orbax warns of choices that only matter on several hosts.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._directory = Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("state", "progress")
        )

    def latest_step(self) -> int | None:
        """The step of the last checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state, progress: dict, keep: set[int]) -> None:
        """Saves a checkpoint and then deletes all others but those of the steps in `keep`."""
        before = self.latest_step()
        if step not in self._manager.all_steps():
            progress = {**progress, "sha256": _digest(state)}
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
                    ),
                )
            except Exception as error:  # Orbax, TensorStore, the system: each has its own errors
                raise self._unsaved(step, error, before) from error
        for old in set(self._manager.all_steps()) - keep - {step}:
            self._manager.delete(old)

    def restore(self, step: int, like) -> tuple:
        """Returns (state, progress) of a step; `like` is `shapes_of` a state."""
        if step not in self._manager.all_steps():
            raise DamagedCheckpoint(
                f"The checkpoint {self._directory / str(step)} is missing, and it is the best one. "
                f"Delete {self._directory} and use --resume to train this run again."
            )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
                ),
            )
            state, progress = restored.state, dict(restored.progress)
            intact = progress.pop("sha256") == _digest(state)
        except Exception as error:  # Orbax, TensorStore, JSON: each has its own errors
            raise self._damaged(step, f"{type(error).__name__}") from error
        if not intact:
            raise self._damaged(step, "its checksum is wrong")
        return state, progress

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()

    def _damaged(self, step: int, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            f"The checkpoint {self._directory / str(step)} is damaged ({what}). Delete that folder "
            "and use --resume to go on from the one before it, or from the start if it was alone."
        )

    def _unsaved(self, step: int, error: Exception, before: int | None) -> UnsavedCheckpoint:
        if any(sign in str(error) for sign in _DISK_IS_FULL):
            free = shutil.disk_usage(self._directory).free
            why, then = f"the disk is full: {free:,} bytes are free", "Make room and use"
        else:
            why, then = f"{type(error).__name__}: {error}", "Put that right and use"
        where = "from the start" if before is None else f"from step {before}, which is intact"
        return UnsavedCheckpoint(
            f"The checkpoint {self._directory / str(step)} could not be written ({why}). "
            f"{then} --resume to go on {where}."
        )


def shapes_of(state):
    """What `Checkpoints.restore` must know of a state; it outlives the donation of the state."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def _digest(state) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
