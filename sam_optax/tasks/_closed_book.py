"""Closed-book question answering: Natural Questions, WebQuestions and TriviaQA without context.

| task                     | TFDS                             | validates on | metrics     |
|--------------------------|----------------------------------|--------------|-------------|
| `cbqa_natural_questions` | `natural_questions_open`         | `validation` | `squad`     |
| `cbqa_web_questions`     | `web_questions`                  | `test`       | `squad`     |
| `cbqa_trivia_qa`         | `trivia_qa/unfiltered.nocontext` | `validation` | `trivia_qa` |

Inputs are those of Roberts et al. (2020), whose tasks the paper takes: a prefix and the question.
The model learns one answer to each, the first; in evaluation every gold answer is right. Natural
Questions is its open-domain version, which such work reports on: the other needs the documents.

Training is on all of `train`. Each task has one evaluation split, called `validation` so that one
T5X config serves all: the public set with answers that open-domain work reports as "test", as the
paper's tables do (TriviaQA's own test set has no public answers). The best checkpoint on it,
reported on it, which is what the paper gives, is an optimistic number.

`cbqa_proportional` draws from each task in proportion to its number of training examples, uncapped.
"""

import seqio

from ._metrics import squad, trivia_qa
from ._task import Example, register_task

CLOSED_BOOK_TASKS = ("cbqa_natural_questions", "cbqa_web_questions", "cbqa_trivia_qa")

_T5 = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"


def _natural_questions(example: Example) -> Example:
    answers = example["answer"]
    inputs = "nq question: " + example["question"]
    return {"inputs": inputs, "targets": answers[0], "answers": answers}


def _web_questions(example: Example) -> Example:
    answers = example["answers"]
    inputs = "wq question: " + example["question"]
    return {"inputs": inputs, "targets": answers[0], "answers": answers}


def _trivia_qa(example: Example) -> Example:
    answer = example["answer"]
    inputs = "trivia_qa question: " + example["question"]
    return {"inputs": inputs, "targets": answer["value"], "answers": answer["aliases"]}


register_task(
    "cbqa_natural_questions",
    "natural_questions_open:1.0.0",
    {"train": "train", "validation": "validation"},
    _natural_questions,
    _T5,
    [squad],
)
register_task(
    "cbqa_web_questions",
    "web_questions:1.0.0",
    {"train": "train", "validation": "test"},
    _web_questions,
    _T5,
    [squad],
)
register_task(
    "cbqa_trivia_qa",
    "trivia_qa/unfiltered.nocontext:1.1.0",
    {"train": "train", "validation": "validation"},
    _trivia_qa,
    _T5,
    [trivia_qa],
)
seqio.MixtureRegistry.add(
    "cbqa_proportional", CLOSED_BOOK_TASKS, default_rate=seqio.mixing_rate_num_examples
)
