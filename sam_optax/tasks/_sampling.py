"""Tasks and mixtures that train on a fixed part of their training split.

Which part is decided example by example, from a hash of all that the data set says of the example
(its features before preprocessing, so any id among them) and the seed. It hence depends neither on
how the data are stored and sharded, nor on order, hosts, processes or epochs; a larger rate with
the same seed takes a superset. Examples that are equal in every feature are in or out together.

TFDS's own `tfds_id` would not do: it names the file shard that an example was stored in, and SeqIO
can ask for it only for all tasks of a process at once.
"""

import importlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from .._checks import check_integer, check_number

_WHOLE = 1_000_000  # rates are whole millionths, so that a name has one rate and back

_T5_NEEDS = "babel editdistance gin-config rouge-score sacrebleu scikit-learn scipy"


def sampled(name: str, rate: float, seed: int = 0) -> str:
    """Register the variant of a task or mixture that trains on a part of the data; return its name.

    Its `train` split is a fixed random subset, the same in every process and for every number of
    hosts; the 5% subset of a seed lies within the 20% subset of that seed. All other splits are
    those of the original. Each example is in the subset with probability `rate`, so its size is
    about that share: of SuperGLUE's CB, 250 examples, 5% are 12 or so, give or take 4.

    Of a mixture, every member is sampled, those it only evaluates on too (which changes their names
    and nothing else), and mixing rates follow: what was proportional to the data still is. Rates
    that are numbers are multiplied by `rate`; rates that are functions are asked about the sampled
    task, whose `num_input_examples` is the expected number.

    From gin, with T5X's macros:

        from __gin__ import dynamic_registration
        from sam_optax import tasks
        MIXTURE_OR_TASK_NAME = @tasks.sampled()
        tasks.sampled.name = "super_glue_v102_proportional"
        tasks.sampled.rate = %SAMPLING_RATE
        tasks.sampled.seed = %SAMPLING_SEED
        USE_CACHED_TASKS = False

    Cached data would be looked for under the new names, where there are none. Where SeqIO splits
    single examples over hosts (a data set in fewer files than hosts), each needs at least one
    example of each member, or its mixture ends at once.

    Args:
      name: a registered task or mixture, or one that PyPI's `t5` registers, which is then imported,
        such as `super_glue_v102_proportional`, or `glue_v200_proportional`.
      rate: the share of the training examples, in (0, 1], to six decimals; the paper's go from 0.02
        to 0.8. 1 is the original.
      seed: which subset, at least 0.

    Returns:
      The name, `<name>_at_<percent>pct_seed<seed>` with a `p` for the decimal point; `name` itself
      for `rate=1`.

    Raises:
      ValueError: `rate` is not in (0, 1], `seed` is negative, no such task or mixture is
        registered, or it is a sample already. Reading the `train` split raises it if no example at
        all is in the subset.
      TypeError: `rate` is not a number, or `seed` is not an integer.

    Example:
      >>> from sam_optax import tasks
      >>> tasks.sampled("cbqa_proportional", rate=0.05)
      'cbqa_proportional_at_5pct_seed0'
      >>> tasks.sampled("tydiqa_goldp", rate=0.025, seed=3)
      'tydiqa_goldp_at_2p5pct_seed3'
    """
    millionths = _millionths(rate)
    check_integer("seed", seed, at_least=0)
    provider = find(name)
    return name if millionths == _WHOLE else _register(provider, millionths, seed)


def _millionths(rate: Any) -> int:
    check_number("rate", rate, example=0.05)
    share = float(rate)
    millionths = round(share * _WHOLE) if 0 < share <= 1 else 0
    if not millionths:
        raise ValueError(
            f"rate={rate!r} must be in (0, 1], to six decimals: it is the share of the training "
            "examples, not a percentage. For 5%, say 0.05."
        )
    return millionths


def find(name: str) -> Any:
    """Return the task or mixture `name`, after importing PyPI's `t5` if it is not there yet.

    Raises:
      ValueError: there is none.
    """
    missing = None
    if not _is_registered(name):
        try:
            importlib.import_module("sam_optax.tasks.glue")  # and with it t5's own
        except ImportError as error:
            missing = error
    if not _is_registered(name):
        raise ValueError(
            f"name={name!r} is not a task or mixture that SeqIO knows. Import the module that "
            "registers it first"
            + (
                f"; if it is one of PyPI's t5, which cannot be imported ({missing}), install that: "
                f"pip install --no-deps t5 && pip install {_T5_NEEDS}"
                if missing
                else "; `sam_optax.tasks` and PyPI's t5 have been imported, and it is in neither"
            )
            + "."
        ) from missing
    return seqio.get_mixture_or_task(name)


def original(source: Any) -> Any:
    """Return the data source that `source` is a sample of, or itself."""
    return source.whole if isinstance(source, SampledSource) else source


def _is_registered(name: str) -> bool:
    return name in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names()


def _register(provider: Any, millionths: int, seed: int) -> str:
    percent = f"{millionths / 10_000:.4f}".rstrip("0").rstrip(".").replace(".", "p")
    name = f"{provider.name}_at_{percent}pct_seed{seed}"
    if _is_registered(name):
        return name
    if isinstance(provider, seqio.Mixture):
        members = [
            (_register(seqio.get_mixture_or_task(member), millionths, seed), rate)
            for member, rate in provider.rate_per_task_name.items()
        ]
        share = millionths / _WHOLE
        seqio.MixtureRegistry.add(
            name,
            [(m, r * share if isinstance(r, numbers.Real) else r) for m, r in members],
            sample_fn=provider._sample_fn,  # pyright: ignore[reportPrivateUsage]
        )
    else:
        source = SampledSource(provider.source, millionths, seed)
        seqio.TaskRegistry.add_provider(name, provider.replace(name=name, source=source))
    return name


class SampledSource(seqio.DataSource):
    """A data source with part of the training examples of another, and its other splits as is."""

    def __init__(self, source: Any, millionths: int, seed: int):
        """Take `millionths` of `source`."""
        if isinstance(source, SampledSource):
            raise ValueError(
                f"{source!r} is a sample already; sample the original task at the rate in the end."
            )
        super().__init__(
            splits=(),
            caching_permitted=source.caching_permitted,
            performs_internal_shuffling=source.performs_internal_shuffling,
        )
        self.whole = source
        self._millionths = millionths
        self._seed = seed

    def __repr__(self) -> str:
        return f"SampledSource({self.whole!s}, {self._millionths}, {self._seed})"

    @property
    def splits(self) -> Sequence[str]:
        """The splits of the original, which TFDS may have to be asked for."""
        return self.whole.splits

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether the original reads any number of shards."""
        return self.whole.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        """Return the files of the original."""
        return self.whole.list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        """Return the expected number of examples: to know it exactly takes reading them all."""
        examples = self.whole.num_input_examples(split)
        if split != "train" or examples is None or math.isinf(examples):
            return examples
        return max(1, round(examples * self._millionths / _WHOLE))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **kwargs: Any,
    ) -> "tf.data.Dataset[Any]":
        """Return the split, less the training examples that are not in the sample."""
        dataset = self.whole.get_dataset(
            split=split, shuffle=shuffle, seed=seed, shard_info=shard_info, **kwargs
        )
        if split != "train":
            return dataset
        dataset = dataset.filter(self._is_in)
        # An empty member would silently end a mixture, or leave a task waiting for ever.
        if tf.executing_eagerly() and not any(True for _ in dataset.take(1)):
            raise ValueError(
                f"No training example of {self.whole!s} (shard {shard_info}) is in its sample of "
                f"{self._millionths / _WHOLE:g} of the data; take a higher rate or another seed."
            )
        return dataset

    def _is_in(self, example: Any) -> tf.Tensor:
        text = tf.strings.join([str(self._seed), _identity(example)], "\x1d")
        # The one hash of TensorFlow's that is promised never to change.
        return tf.strings.to_hash_bucket_fast(text, _WHOLE) < self._millionths


def _identity(example: Any) -> tf.Tensor:
    """Return all that the data set says of an example, as one string."""
    if isinstance(example, dict):  # TFDS's own id, if asked for, says in which file it is
        example = {name: feature for name, feature in example.items() if name != "tfds_id"}
    features = tf.nest.flatten(example, expand_composites=True)  # dicts in the order of their keys
    texts = [f if f.dtype == tf.string else tf.strings.as_string(f) for f in features]
    joined = [tf.strings.reduce_join(tf.reshape(t, [-1]), separator="\x1f") for t in texts]
    return tf.strings.join(joined, "\x1e")
