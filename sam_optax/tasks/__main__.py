"""Download and prepare the data of tasks and mixtures, once, before the first run that reads them.

  python -m sam_optax.tasks super_glue_v102_proportional glue_v200_proportional
  python -m sam_optax.tasks cbqa_proportional tydiqa_goldp --tfds_data_dir gs://my-bucket/tfds

SeqIO asks for the number of examples before it would download them, and fails.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow_datasets as tfds

from ._sampling import find, original


def data_sets(name: str) -> list[str]:
    """Return the TFDS names of all data that a task or mixture reads.

    Raises:
      ValueError: no such task or mixture is registered.
    """
    provider = find(name)
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    sources: list[Any] = [original(task.source) for task in tasks]
    names = [s.tfds_dataset.name for s in sources if isinstance(s, seqio.TfdsDataSource)]
    return list(dict.fromkeys(map(str, names)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what is not there yet, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="TASK_OR_MIXTURE")
    parser.add_argument("--tfds_data_dir", help="default: ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    try:
        wanted = [data_set for name in options.names for data_set in data_sets(name)]
    except ValueError as error:
        parser.error(str(error))
    for data_set in dict.fromkeys(wanted):
        print(data_set, flush=True)
        tfds.builder(data_set, data_dir=options.tfds_data_dir).download_and_prepare()
    return 0


if __name__ == "__main__":
    sys.exit(main())
