import pytest
import seqio

from sam_optax import tasks

GOLDP = "tydi_qa/goldp:3.0.0"
EVALUATED = {f"validation-{language}": 3 for language in tasks.LANGUAGES}


def _row(question, context, *answers):
    return {
        "id": "finnish-1",
        "title": "t",
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": [0] * len(answers)},
    }


def _texts(example):
    return tuple(example[f"{key}_pretokenized"].decode() for key in ("inputs", "targets"))


def test_inputs_and_targets_by_hand(mock_tfds, in_bytes):
    rows = [
        _row("Milloin  se oli?", "Se oli n. 2,5 s (1999).", "n. 2,5 s", "1999"),
        # Vowel signs belong to their letters, and underscores to their words.
        _row("এটি কী?", "এটি_হ্যাঁ।", "হ্যাঁ।"),
    ]
    mock_tfds({GOLDP: {"train": 2}}, rows={"train": rows})
    in_bytes("tydiqa_goldp")
    dataset = seqio.get_mixture_or_task("tydiqa_goldp_train").get_dataset(None, shuffle=False)
    first, second = dataset.as_numpy_iterator()
    assert _texts(first) == (
        "question: Milloin se oli ? context: Se oli n . 2 , 5 s ( 1999 ) . ",
        "n . 2 , 5 s",
    )
    assert [a.decode() for a in first["answers"]] == ["n . 2 , 5 s", "1999"]
    assert _texts(second) == ("question: এটি কী ? context: এটি_হ্যাঁ । ", "হ্যাঁ । ")


def test_each_language_has_its_own_f1_and_em(mock_tfds, in_bytes):
    rows = {
        f"validation-{language}": [_row("?", "c", f"one {language}", "two")]
        for language in tasks.LANGUAGES
    }
    mock_tfds({GOLDP: EVALUATED}, rows=rows)
    in_bytes("tydiqa_goldp")
    for language in tasks.LANGUAGES:
        task = seqio.TaskRegistry.get(f"tydiqa_goldp_{language}")
        assert set(task.splits) == {"validation"}
        (example,) = task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
        gold = task.postprocess_fn("", example=example, is_target=True)
        assert gold == [f"one {language}", "two"]
        (metric,) = task.metric_fns
        assert metric([gold], [language]) == pytest.approx({"em": 0, "f1": 200 / 3})
        assert metric([gold], ["Two."]) == {"em": 100, "f1": 100}


def test_the_mixture_trains_on_all_languages_and_evaluates_each(mock_tfds, in_bytes):
    mock_tfds({GOLDP: {"train": 8, "validation": 3, **EVALUATED}})
    mixture = in_bytes("tydiqa_goldp")
    training = [task.name for task in mixture.tasks if "train" in task.splits]
    assert training == ["tydiqa_goldp_train"]
    evaluated = {task.name for task in mixture.tasks if "validation" in task.splits}
    assert evaluated == {f"tydiqa_goldp_{language}" for language in tasks.LANGUAGES}
    converter = seqio.EncDecFeatureConverter(pack=False)
    dataset = seqio.get_dataset("tydiqa_goldp", {"inputs": 64, "targets": 16}, converter)
    assert len(list(dataset.as_numpy_iterator())) == 8
