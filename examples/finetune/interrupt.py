"""Ctrl-C as a request: finish the step, save, and only then stop."""

import contextlib
import signal


class Interrupted(Exception):
    """Training stopped early, on request, after saving a checkpoint."""

    def __init__(self, step: int):
        """Remembers the step that the checkpoint holds."""
        super().__init__(f"stopped at step {step}")
        self.step = step


@contextlib.contextmanager
def stop_on_ctrl_c():
    """Yields `requested() -> bool`. The first Ctrl-C only sets it; a second one acts as usual."""
    received = []

    def first_time(signum, frame):
        received.append(signum)
        signal.signal(signal.SIGINT, previous)
        print("\nStopping after this step (Ctrl-C again to stop at once) ...", flush=True)

    previous = signal.signal(signal.SIGINT, first_time)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
