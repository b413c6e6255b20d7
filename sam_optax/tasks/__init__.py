"""SeqIO tasks of the paper that PyPI's `t5` does not register, and samples of any training split.

Importing this module registers with SeqIO, without touching the network:

- `cbqa_natural_questions`, `cbqa_web_questions`, `cbqa_trivia_qa` and their mixture
  `cbqa_proportional`: closed-book question answering for T5, see `_closed_book`.
- `tydiqa_goldp` for mT5, with `tydiqa_goldp_train` and `tydiqa_goldp_<language>`: see `_tydiqa`.

`sampled` makes the variant of any task or mixture, these and the SuperGLUE and GLUE ones of `t5`,
that trains on a fixed part of the training split.

`sam_optax.tasks.glue` registers GLUE as `glue_v200_proportional`, on data that can still be made.

The data are TensorFlow Datasets', in `~/tensorflow_datasets` or what
`seqio.set_tfds_data_dir_override` says, and must be there before the first run:
`python -m sam_optax.tasks NAME` downloads and prepares them. No cached version of these tasks is
published, so T5X needs `USE_CACHED_TASKS = False`.
"""

from ._closed_book import CLOSED_BOOK_TASKS
from ._metrics import squad, trivia_qa
from ._sampling import sampled
from ._tydiqa import LANGUAGES

__all__ = ["CLOSED_BOOK_TASKS", "LANGUAGES", "sampled", "squad", "trivia_qa"]
