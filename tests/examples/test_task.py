import re

import numpy as np
import pytest
import seqio
from finetune import task


def _words(split, fraction=1.0, seed=0):
    return [word for word, _, _ in task.split_examples(split, fraction, seed)]


def test_splits_share_no_word_and_cover_all():
    splits = [set(_words(split)) for split in task.SPLITS]
    assert set.union(*splits) == set(task.pronunciations())
    assert sum(map(len, splits)) == len(task.pronunciations())
    shares = [len(words) / len(task.pronunciations()) for words in splits]
    np.testing.assert_allclose(shares, [0.90, 0.05, 0.05], atol=0.005)


def test_split_of_a_word_never_changes():
    # Written down once: another hash or threshold would silently mix train and test.
    found = {word: task.split_of(word) for word in ("sharpness", "aware", "mcsorley")}
    assert found == {"sharpness": "train", "aware": "validation", "mcsorley": "test"}
    assert _words("validation")[0] == "plantronics"
    assert _words("test")[0] == "mcsorley"


def test_words_are_letters_only_and_short():
    for word, codes in task.pronunciations().items():
        assert re.fullmatch("[a-z]{2,12}", word)
        assert all(0 < len(code) <= 12 for code in codes)


def test_smaller_training_subsets_lie_inside_larger_ones():
    small, large = (_words("train", fraction) for fraction in (0.02, 0.05))
    assert small == large[: len(small)]
    assert len(large) / len(_words("train")) == pytest.approx(0.05, abs=0.005)


def test_subset_depends_on_the_seed_and_the_other_splits_do_not():
    assert set(_words("train", 0.05, seed=0)) != set(_words("train", 0.05, seed=1))
    assert _words("test", 0.05, seed=0) == _words("test", 1.0, seed=1)


def test_training_has_every_pronunciation_and_evaluation_one_example_per_word():
    examples = task.split_examples("train", 1.0, 0)
    assert len(examples) > len({word for word, _, _ in examples})
    for word, code, accepted in examples[:2000]:
        assert code in accepted.split()
        assert tuple(accepted.split()) == task.pronunciations()[word]
    for split in ("validation", "test"):
        assert len(set(_words(split))) == len(_words(split))


def test_code_is_one_distinct_letter_for_each_of_39_phonemes():
    assert len(task.ONE_LETTER) == len(set(task.ONE_LETTER.values())) == 39
    assert task.pronunciations()["sharpness"] == ("SarpnAs",)
    assert set(task.pronunciations()["tomato"]) == {"tAmeto", "tAmato"}


def test_registered_task_works_with_seqio_shuffled_and_sharded():
    lengths = task.SEQUENCE_LENGTH
    converter = seqio.EncDecFeatureConverter(pack=False)
    shards = [
        seqio.get_dataset(
            "cmudict_pronunciation_2pct_seed0",
            lengths,
            converter,
            shuffle=True,
            seed=1,
            shard_info=seqio.ShardInfo(index, 2),
        )
        for index in range(2)
    ]
    rows = [
        tuple(x["encoder_input_tokens"]) + tuple(x["decoder_target_tokens"])
        for shard in shards
        for x in shard.as_numpy_iterator()
    ]
    assert len(rows) == len(task.split_examples("train", 0.02, 0))
    vocabulary = seqio.ByteVocabulary()
    decoded = {(vocabulary.decode(r[:13]), vocabulary.decode(r[13:])) for r in rows}
    assert decoded == {(word, code) for word, code, _ in task.split_examples("train", 0.02, 0)}


def test_seqio_evaluator_gives_the_metrics_of_perfect_and_of_empty_predictions():
    evaluator = seqio.Evaluator(
        "cmudict_pronunciation",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        num_examples=20,
        sequence_length=task.SEQUENCE_LENGTH,
        async_compute_metrics=False,
    )
    vocabulary = seqio.ByteVocabulary()
    codes = [code for _, code, _ in task.split_examples("validation", 1.0, 0)][:20]

    def metrics(texts):
        tokens = [[*vocabulary.encode(text), 1] for text in texts]
        tokens = [row + [0] * (13 - len(row)) for row in tokens]  # as models give them

        def predict(dataset, *args, **kwargs):
            return [(i, tokens[i]) for i in range(len(tokens))]

        results, _ = evaluator.evaluate(
            compute_metrics=True, predict_fn=predict, score_fn=None, step=0
        )
        return results.result()["cmudict_pronunciation"]

    assert _values(metrics(codes)) == (100, 0)
    assert _values(metrics([""] * 20)) == (0, 100)


def _values(results):
    return results["exact_match"], results["phoneme_error_rate"]


def test_any_accepted_pronunciation_is_right():
    targets = ["tAmeto tAmato", "k@t"]
    assert task.exact_match(targets, ["tAmato", "k@t"]) == {"exact_match": 100}
    assert task.exact_match(targets, ["tAmAto", "k@t"]) == {"exact_match": 50}
    assert task.phoneme_error_rate(targets, ["tAmato", "k@t"]) == {"phoneme_error_rate": 0}


def test_error_rate_is_total_errors_over_total_length_of_the_nearest():
    # "abx" is 1 from "abc" and 3 from "abcdef"; "" is 2 from "kk": (1 + 2) / (3 + 2).
    targets, predictions = ["abcdef abc", "kk"], ["abx", ""]
    assert task.phoneme_error_rate(targets, predictions) == {"phoneme_error_rate": 60}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3)],
)
def test_edit_distance(a, b, distance):
    assert task.edit_distance(a, b) == distance


def test_a_fraction_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="data_fraction=1e-09"):
        task.register_task(1e-9, seed=0)
