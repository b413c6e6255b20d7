import numpy as np
import pytest
from finetune import data, task


@pytest.fixture(scope="module")
def split():
    return data.load_split(task.register_task(0.02), "train", task.SEQUENCE_LENGTH, limit=100)


def _rows(batch):
    return [tuple(row) for row in batch["encoder_input_tokens"]]


def test_a_batch_depends_on_seed_and_step_alone(split):
    later = data.batch_at(split.features, 3, 17, 8)
    for step in range(5):
        data.batch_at(split.features, 3, step, 8)
    again = data.batch_at(split.features, 3, 17, 8)
    for name in later:
        np.testing.assert_array_equal(later[name], again[name])
    assert _rows(later) != _rows(data.batch_at(split.features, 4, 17, 8))
    assert _rows(later) != _rows(data.batch_at(split.features, 3, 18, 8))


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order(split):
    first = [row for step in range(10) for row in _rows(data.batch_at(split.features, 0, step, 10))]
    second = [
        row for step in range(10, 20) for row in _rows(data.batch_at(split.features, 0, step, 10))
    ]
    assert sorted(first) == sorted(second) == sorted(_rows(split.features))
    assert first != second


def test_rows_of_a_batch_stay_together(split):
    whole = {
        (*x, *y)
        for x, y in zip(
            split.features["encoder_input_tokens"],
            split.features["decoder_target_tokens"],
            strict=True,
        )
    }
    batch = data.batch_at(split.features, 0, 3, 8)
    pairs = zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
    assert all((*x, *y) in whole for x, y in pairs)


def test_a_batch_larger_than_the_data_is_an_error(split):
    with pytest.raises(ValueError, match="batch_size=101 is more than the 100"):
        data.batch_at(split.features, 0, 0, 101)


def test_padded_batches_hold_everything_once_and_padding_weighs_nothing(split):
    batches = list(data.padded_batches(split.features, 32))
    assert [len(b["encoder_input_tokens"]) for b in batches] == [32] * 4
    rows = [row for batch in batches for row in _rows(batch)]
    assert rows[:100] == _rows(split.features)
    assert batches[-1]["decoder_loss_weights"][4:].sum() == 0


def test_split_is_in_the_tasks_order_with_all_accepted_answers():
    name = task.register_task(0.02)
    split = data.load_split(name, "validation", task.SEQUENCE_LENGTH, limit=50)
    expected = [a for _, _, a in task.split_examples("validation", 0.02, 0)[:50]]
    assert split.accepted == expected
    targets = split.features["decoder_target_tokens"]
    np.testing.assert_array_equal(split.features["decoder_input_tokens"][:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(split.features["decoder_loss_weights"], targets != 0)
