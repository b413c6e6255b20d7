import random

import numpy as np
import pytest

from sam_optax import tasks


@pytest.mark.parametrize(
    ("answers", "prediction", "em", "f1"),
    [
        (["Paris"], "paris", 100, 100),
        (["The Beatles"], "beatles", 100, 100),
        (["an apple a day"], "apple  day\n", 100, 100),
        (["U.S."], "US", 100, 100),  # punctuation is dropped
        (["Spider-Man"], "spider man", 0, 0),  # and leaves no space: "spiderman"
        (["1998", "2 May 1998"], "May 1998", 0, 80),  # of 2/3 and 4/5, the better
        (["red green blue", "x"], "blue blue red", 0, 100 * 2 / 3),  # a word counts once each
        (["Paris"], "", 0, 0),
        (["the"], "a", 100, 0),  # nothing is left of either: equal, but no word in common
        ([], "Paris", 0, 0),
        (["আমি"], "আমি", 100, 100),
        (["ال بيت"], "بيت", 0, 100 * 2 / 3),  # English articles alone are dropped
        (["«да»"], "да", 0, 0),  # and ASCII punctuation alone
        (["one« »two"], "one«the»two", 100, 100),  # an article leaves a space
    ],
)
def test_squad(answers, prediction, em, f1):
    assert tasks.squad([answers], [prediction]) == pytest.approx({"em": em, "f1": f1})


@pytest.mark.parametrize(
    ("answers", "prediction", "em", "f1"),
    [
        (["Spider-Man"], "spider man", 100, 100),
        (["rock_n_roll", "x"], "rock n roll", 100, 100),
        (["\u2018Allo \u2019Allo!"], "allo allo", 100, 100),
        (["d\u00b4Artagnan"], "d artagnan", 100, 100),
        (["U.S."], "us", 0, 0),
        (["sea of the tranquility"], "sea of", 0, 80),
    ],
)
def test_trivia_qa(answers, prediction, em, f1):
    assert tasks.trivia_qa([answers], [prediction]) == pytest.approx({"em": em, "f1": f1})


def test_scores_are_means_over_questions():
    targets = [["a dog"], ["cat", "kitten"], ["two words"], ["x"]]
    predictions = ["dog", "kitten", "words", "y"]
    expected = pytest.approx({"em": 50, "f1": 100 * (2 + 2 / 3) / 4})
    assert tasks.squad(targets, predictions) == expected
    arrays = [np.array(answers) for answers in targets]
    assert tasks.squad(arrays, np.array(predictions)) == expected


@pytest.mark.parametrize("targets, predictions", [([["a"]], []), ([], []), ([["a"]], ["a", "b"])])
def test_one_prediction_for_each_question(targets, predictions):
    with pytest.raises(ValueError, match=f"{len(targets)} targets and {len(predictions)} pred"):
        tasks.squad(targets, predictions)


@pytest.mark.parametrize(
    ("targets", "predictions", "message"),
    [
        (["Paris"], ["paris"], r"targets\[0\]='Paris' must be the gold answers .* list of strings"),
        ([["a"], b"b"], ["a", "b"], r"targets\[1\]=b'b' must be"),
        ([[b"a"]], ["a"], r"targets\[0\]=\[b'a'\] must be .* decode bytes"),
        ([["a"]], [b"a"], r"predictions\[0\]=b'a' must be a string; decode bytes"),
        ([["a"]], [None], r"predictions\[0\]=None must be a string"),
        ([None], ["a"], r"targets\[0\]=None must be"),
        ([iter(["a"])], ["a"], r"targets\[0\]=<list_iterator .* must be"),
    ],
)
def test_what_is_no_text(targets, predictions, message):
    for metric in (tasks.squad, tasks.trivia_qa):
        with pytest.raises(TypeError, match=message):
            metric(targets, predictions)


def test_same_scores_as_t5s():
    metrics = pytest.importorskip("t5.evaluation.metrics", reason="needs PyPI's t5")
    generator = random.Random(0)
    pieces = [
        "the",
        "An",
        "a",
        " ",
        "  ",
        "cat",
        "Cat's",
        "U.S.",
        "_",
        "\u2019",
        "-",
        "12",
        "é",
        "«",
    ]

    def text():
        return generator.choice(["", " "]).join(
            generator.choices(pieces, k=generator.randint(0, 5))
        )

    targets = [[text() for _ in range(generator.randint(1, 4))] for _ in range(2000)]
    predictions = [text() for _ in targets]
    for ours, theirs in [(tasks.squad, metrics.squad), (tasks.trivia_qa, metrics.trivia_qa)]:
        for i in range(0, 2000, 5):
            each = targets[i : i + 5], predictions[i : i + 5]
            assert ours(*each) == pytest.approx(theirs(*each))
