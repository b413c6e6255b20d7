"""TyDiQA-GoldP for mT5: find the answer in a passage, in nine languages.

- `tydiqa_goldp_train`: the training split, all languages together; nothing to evaluate.
- `tydiqa_goldp_<language>`, for each of `LANGUAGES`: its validation split, with exact match and F1.
- `tydiqa_goldp`: the mixture of them, so a T5X run trains on all languages and reports each.

Inputs and targets are those of mT5's own `mt5_tydiqa`, with spaces around punctuation in questions,
passages and answers. The metrics are SQuAD's in every language, as the data set's authors have it.
The averages in the paper's tables are over all nine languages; the authors of TyDiQA leave English
out. The data are version 3.0.0, which TFDS makes now: against mT5's 2.1.0 it corrects the places of
answers, which these tasks do not use.
"""

from collections.abc import Callable
from typing import Any

import seqio
import tensorflow as tf

from ._metrics import squad
from ._task import Example, register_task

LANGUAGES = ("en", "ar", "bn", "fi", "id", "ko", "ru", "sw", "te")

_TFDS_NAME = "tydi_qa/goldp:3.0.0"
_MT5 = "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model"


def _goldp(example: Example) -> Example:
    answers = _pad_punctuation(example["answers"]["text"])
    question = _pad_punctuation(example["question"])
    context = _pad_punctuation(example["context"])
    inputs = _single_spaces(tf.strings.join(["question:", question, "context:", context], " "))
    return {"inputs": inputs, "targets": answers[0], "answers": answers, "id": example["id"]}


def _pad_punctuation(text: tf.Tensor) -> tf.Tensor:
    """Put spaces around everything but letters with their marks, digits and underscores."""
    return _single_spaces(tf.strings.regex_replace(text, r"([^\p{L}\p{M}\p{N}\s_])", r" \1 "))


def _single_spaces(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def _register_split(name: str, splits: dict[str, str], metrics: list[Callable[..., Any]]) -> str:
    return register_task(name, _TFDS_NAME, splits, _goldp, _MT5, metrics)


seqio.MixtureRegistry.add(
    "tydiqa_goldp",
    [
        _register_split("tydiqa_goldp_train", {"train": "train"}, metrics=[]),
        *(
            _register_split(f"tydiqa_goldp_{lang}", {"validation": f"validation-{lang}"}, [squad])
            for lang in LANGUAGES
        ),
    ],
    default_rate=1.0,  # of no effect: one task alone has a training split
)
