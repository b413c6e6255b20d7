"""Exact match and F1 of answers, in percent, as the SQuAD and TriviaQA evaluation scripts do it.

Both compare normalised words and give each prediction its best gold answer. They differ in the
normalisation: SQuAD's drops punctuation, TriviaQA's puts a space there.
"""

import collections
import re
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACE_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))

Normalise = Callable[[str], str]


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Return exact match and F1 in percent, by SQuAD v1.1's rules.

    These are the metrics of Natural Questions, WebQuestions and of every language of TyDiQA-GoldP,
    whose authors evaluate with SQuAD's script; so only English articles are dropped.

    Args:
      targets: the gold answers of each question. A question without any counts as wrong.
      predictions: the predicted answer to each question.

    Returns:
      `{"em": ..., "f1": ...}`, the means over questions.

    Raises:
      ValueError: there are no questions, or not one prediction for each.
      TypeError: an element of `targets` is no list of strings, or a prediction no string.

    Example:
      >>> squad([["The U.S.", "America"], ["2 May 1998"]], ["us", "May 1998"])
      {'em': 50.0, 'f1': 90.0}
    """
    return _scores(targets, predictions, _normalise_squad)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Return exact match and F1 in percent, by TriviaQA's rules.

    Args:
      targets: the gold answers of each question. A question without any counts as wrong.
      predictions: the predicted answer to each question.

    Returns:
      `{"em": ..., "f1": ...}`, the means over questions.

    Raises:
      ValueError: there are no questions, or not one prediction for each.
      TypeError: an element of `targets` is no list of strings, or a prediction no string.

    Example:
      >>> trivia_qa([["Spider-Man"]], ["the spider_man"])
      {'em': 100.0, 'f1': 100.0}
    """
    return _scores(targets, predictions, _normalise_trivia_qa)


def _scores(
    targets: Sequence[Sequence[str]], predictions: Sequence[str], normalise: Normalise
) -> dict[str, float]:
    if len(targets) != len(predictions) or not len(predictions):
        raise ValueError(
            f"There are {len(targets)} targets and {len(predictions)} predictions; give the gold "
            "answers of at least one question, and one prediction for each."
        )
    _check_texts(targets, predictions)
    em = f1 = 0.0
    for answers, prediction in zip(targets, predictions, strict=True):
        words = normalise(prediction).split()
        gold = [normalise(answer).split() for answer in answers]
        em += words in gold
        f1 += max((_f1(words, answer) for answer in gold), default=0.0)
    return {"em": 100 * em / len(predictions), "f1": 100 * f1 / len(predictions)}


def _check_texts(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    for i, (answers, prediction) in enumerate(zip(targets, predictions, strict=True)):
        # A text is a collection of texts, too: its letters. An iterator would be empty afterwards.
        several = isinstance(answers, Collection) and not isinstance(answers, str | bytes)
        if not several or not all(isinstance(x, str) for x in answers):
            raise TypeError(
                f"targets[{i}]={answers!r} must be the gold answers of a question, a list of "
                "strings such as ['Paris']; decode bytes."
            )
        if not isinstance(prediction, str):
            raise TypeError(f"predictions[{i}]={prediction!r} must be a string; decode bytes.")


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = (collections.Counter(prediction) & collections.Counter(answer)).total()
    # Two empty answers match exactly but share no word: 0, as in both scripts.
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def _normalise_squad(text: str) -> str:
    return _without_articles(text.lower().translate(_DROP_PUNCTUATION))


def _normalise_trivia_qa(text: str) -> str:
    return _without_articles(text.lower().translate(_SPACE_PUNCTUATION))


def _without_articles(text: str) -> str:
    return re.sub(r"\b(a|an|the)\b", " ", text)
