"""What all tasks here have in common: TFDS questions as text to text, with all gold answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

Example = Mapping[str, Any]


def register_task(
    name: str,
    tfds_name: str,
    splits: Mapping[str, str],
    read: Callable[[Example], Example],
    vocabulary_file: str,
    metrics: Sequence[Callable[..., Any]],
) -> str:
    """Register a question answering task with SeqIO.

    Args:
      name: the name of the task.
      tfds_name: the data set, `name:version` or `name/config:version`.
      splits: TFDS's split for each split of the task.
      read: turns an example of the data set into its `inputs`, `targets` and gold `answers`.
      vocabulary_file: a SentencePiece model.
      metrics: functions of the gold answers and the predictions.

    Returns:
      `name`.
    """
    # T5X refuses a task whose vocabulary is not the model's: the same file, and no further ids.
    feature = seqio.Feature(seqio.SentencePieceVocabulary(vocabulary_file), add_eos=True)
    source: Any = seqio.TfdsDataSource(tfds_name, splits=dict(splits))
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            lambda dataset: dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=_gold_answers,
        metric_fns=list(metrics),
    )
    return name


def _gold_answers(output: str, example: Any = None, is_target: bool = False) -> str | list[str]:
    """Leave a prediction alone, and turn a target into all gold answers of its example."""
    if not is_target:
        return output
    return [tf.compat.as_text(answer) for answer in example["answers"]]
