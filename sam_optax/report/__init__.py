"""Results of T5X runs, with and without SAM, beside the paper's: `python -m sam_optax.report`.

It reads what SeqIO's evaluators write, without T5X, SeqIO or TensorFlow. `runs` and `settings` read
a run's folder; `best` takes the best checkpoints; `compare` puts runs side by side; `tables` and
`plot` show them; `tasks` and `paper` hold the benchmarks and the paper's figures.
"""

from .command import main

__all__ = ["main"]
