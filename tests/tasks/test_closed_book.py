import collections

import pytest
import seqio

from sam_optax import tasks

NQ, WQ, TRIVIA = (
    "natural_questions_open:1.0.0",
    "web_questions:1.0.0",
    "trivia_qa/unfiltered.nocontext:1.1.0",
)
SIZES = {
    NQ: {"train": 30, "validation": 6},
    WQ: {"train": 10, "test": 6},
    TRIVIA: {"train": 20, "validation": 6, "test": 6},
}


def _examples(name, split):
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split, shuffle=False)
    return list(dataset.as_numpy_iterator())


def _texts(example):
    return tuple(example[f"{key}_pretokenized"].decode() for key in ("inputs", "targets"))


def _metrics(name, split, predictions):
    """The metrics of predictions, through the task's own postprocessing."""
    task = seqio.get_mixture_or_task(name)
    examples = _examples(name, split)
    targets = [
        task.postprocess_fn(_texts(example)[1], example=example, is_target=True)
        for example in examples
    ]
    predictions = [
        task.postprocess_fn(prediction, example=example, is_target=False)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    (metric,) = task.metric_fns
    return metric(targets, predictions)


def test_natural_questions_by_hand(mock_tfds, in_bytes):
    rows = [
        {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]},
        {"question": "when was it out", "answer": ["23 December 1815"]},
    ]
    mock_tfds({NQ: SIZES[NQ]}, rows={"train": rows, "validation": rows})
    in_bytes("cbqa_natural_questions")
    assert [_texts(example) for example in _examples("cbqa_natural_questions", "train")] == [
        ("nq question: who wrote emma", "Jane Austen"),
        ("nq question: when was it out", "23 December 1815"),
    ]
    metrics = _metrics("cbqa_natural_questions", "validation", ["austen.", "December 1815"])
    assert metrics == pytest.approx({"em": 50, "f1": 90})


def test_web_questions_by_hand(mock_tfds, in_bytes):
    train = [{"url": "u", "question": "what is the nile?", "answers": ["River", "Lake"]}]
    test = [{"url": "u", "question": "where is rome?", "answers": ["Italy", "Lazio"]}]
    mock_tfds({WQ: SIZES[WQ]}, rows={"train": train, "test": test})
    in_bytes("cbqa_web_questions")
    (example,) = _examples("cbqa_web_questions", "train")
    assert _texts(example) == ("wq question: what is the nile?", "River")
    assert _metrics("cbqa_web_questions", "validation", ["the lazio"]) == {"em": 100, "f1": 100}


def test_trivia_qa_by_hand(mock_tfds, in_bytes):
    texts, numbers = {"doc_source", "filename", "title", "wiki_context"}, {"rank"}
    search = {"description", "filename", "title", "url", "search_context"}
    row = {
        "question": "Who is Peter Parker?",
        "question_id": "tc_1",
        "question_source": "s",
        "entity_pages": {name: [] for name in texts},
        "search_results": {name: [] for name in search | numbers},
        "answer": {
            "aliases": ["Spider-Man", "Spidey"],
            "normalized_aliases": ["spider man", "spidey"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "spider man",
            "type": "t",
            "value": "Spider-Man",
        },
    }
    mock_tfds({TRIVIA: SIZES[TRIVIA]}, rows={"train": [row], "validation": [row]})
    in_bytes("cbqa_trivia_qa")
    (example,) = _examples("cbqa_trivia_qa", "train")
    assert _texts(example) == ("trivia_qa question: Who is Peter Parker?", "Spider-Man")
    assert _metrics("cbqa_trivia_qa", "validation", ["spider man"]) == {"em": 100, "f1": 100}


def test_seqios_evaluator_reports_em_and_f1(mock_tfds, in_bytes):
    rows = [{"question": q, "answer": [a, "Ada"]} for q, a in [("who", "Ada Lovelace"), ("x", "y")]]
    mock_tfds({NQ: SIZES[NQ]}, rows={"train": rows, "validation": rows})
    in_bytes("cbqa_natural_questions")
    evaluator = seqio.Evaluator(
        "cbqa_natural_questions",
        seqio.EncDecFeatureConverter(pack=False),
        sequence_length={"inputs": 38, "targets": 18},
        async_compute_metrics=False,
        use_memory_cache=False,
    )
    predictions = [[*seqio.ByteVocabulary().encode(text), 1] for text in ("Lovelace", "the ADA,")]
    results, _ = evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda *args, **kwargs: list(enumerate(predictions)),
        score_fn=None,
        step=0,
    )
    metrics = results.result()["cbqa_natural_questions"]
    assert metrics == pytest.approx({"em": 50, "f1": (200 / 3 + 100) / 2})


@pytest.mark.parametrize("name", tasks.CLOSED_BOOK_TASKS)
def test_tasks_read_what_tfds_makes_up(name, mock_tfds, in_bytes):
    mock_tfds(SIZES)
    task = in_bytes(name)
    assert set(task.splits) == {"train", "validation"}
    for split in ("train", "validation"):
        examples = _examples(name, split)
        assert len(examples) == 30
        for example in examples:
            inputs, targets = _texts(example)
            assert seqio.ByteVocabulary().decode(list(example["inputs"])) == inputs
            assert list(example["targets"]) == [*seqio.ByteVocabulary().encode(targets), 1]
    answers = [task.postprocess_fn("", example=e, is_target=True)[0] for e in examples]
    assert _metrics(name, "validation", answers)["em"] == 100


def test_the_mixture_draws_each_in_proportion_to_its_training_examples(mock_tfds, in_bytes):
    mock_tfds(SIZES)
    mixture = in_bytes("cbqa_proportional")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "cbqa_natural_questions": 30,
        "cbqa_web_questions": 10,
        "cbqa_trivia_qa": 20,
    }
    dataset = mixture.get_dataset(None, "train", seed=0, copy_pretokenized=True).take(600)
    drawn = collections.Counter(_texts(e)[0].split()[0] for e in dataset.as_numpy_iterator())
    assert drawn["nq"] == pytest.approx(300, abs=50)
    assert drawn["wq"] == pytest.approx(100, abs=40)
    assert drawn["trivia_qa"] == pytest.approx(200, abs=45)


def test_the_proportions_are_not_capped(mock_tfds, in_bytes):
    mock_tfds({**SIZES, NQ: {"train": 87_925, "validation": 1}})
    mixture = in_bytes("cbqa_proportional")
    assert mixture.get_rate(seqio.TaskRegistry.get("cbqa_natural_questions")) == 87_925
