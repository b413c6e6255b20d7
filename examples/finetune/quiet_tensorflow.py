"""TensorFlow without its start-up noise, and without any accelerator.

TensorFlow only reads data and writes TensorBoard files here; an accelerator belongs to JAX.
"""

import contextlib
import os
import warnings

from absl import logging


def load() -> None:
    """Imports TensorFlow; call it before importing anything that does so by itself."""
    print("Loading TensorFlow (used by SeqIO and TensorBoard) ...", flush=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.ERROR)
    logging.set_stderrthreshold("error")
    with _without_standard_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)


@contextlib.contextmanager
def _without_standard_error():
    """Sends the process's standard error nowhere: the log level does not silence all of C++."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
