"""A SeqIO Task as numpy arrays, and batches that are a pure function of (seed, step).

The whole Task is read once. What a run sees at step k then needs no iterator state, so a resumed
run needs nothing but k, and two runs with one seed see the same batches.
"""

import dataclasses

import numpy as np
import seqio

from finetune.experiment import SettingsError

Arrays = dict[str, np.ndarray]

_READ_BATCH = 1024  # examples handed from tf.data to numpy at a time, for speed alone


@dataclasses.dataclass(frozen=True)
class Split:
    """Model features of a split (`[examples, length]`) and its postprocessed targets."""

    features: Arrays
    accepted: list[str]
    """As the Task's postprocessor gives them: all right answers, separated by spaces."""

    def __len__(self) -> int:
        return len(self.accepted)


def load_split(
    task_name: str, split: str, sequence_length: dict[str, int], limit: int | None = None
) -> Split:
    """Reads the first `limit` examples of a split (all, if None), in the Task's own order."""
    task = seqio.get_mixture_or_task(task_name)
    dataset = task.get_dataset(sequence_length, split, shuffle=False, try_in_mem_cache=False)
    if limit is not None:
        dataset = dataset.take(limit)
    converter = seqio.EncDecFeatureConverter(pack=False)
    converted = converter(dataset, sequence_length).batch(_READ_BATCH).as_numpy_iterator()
    chunks = list(converted)
    features = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    features["decoder_loss_weights"] = features["decoder_loss_weights"].astype(np.float32)
    accepted = [
        task.postprocess_fn("", example=example, is_target=True)
        for example in dataset.as_numpy_iterator()
    ]
    return Split(features, accepted)


def batch_at(features: Arrays, seed: int, step: int, batch_size: int) -> Arrays:
    """The batch of a 0-based step.

    Every epoch is a new permutation, drawn from a counter-based generator keyed by (seed, epoch).
    The examples left over at the end of an epoch are skipped in it.
    """
    num_examples = len(features["decoder_target_tokens"])
    per_epoch = num_examples // batch_size
    if per_epoch == 0:
        raise SettingsError(
            f"batch_size={batch_size} is more than the {num_examples} training examples; "
            "lower batch_size or raise data_fraction"
        )
    epoch, position = divmod(step, per_epoch)
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    chosen = generator.permutation(num_examples)[position * batch_size :][:batch_size]
    return {name: values[chosen] for name, values in features.items()}


def padded_batches(features: Arrays, batch_size: int):
    """All examples in order, as equally shaped batches; the last is padded with empty examples."""
    num_examples = len(features["decoder_target_tokens"])
    for start in range(0, num_examples, batch_size):
        rows = {name: values[start : start + batch_size] for name, values in features.items()}
        missing = batch_size - len(rows["decoder_target_tokens"])
        yield {name: np.pad(v, ((0, missing), (0, 0))) for name, v in rows.items()}
