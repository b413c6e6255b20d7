"""Which examples take part in the ascent."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import mlp_batch, mlp_loss, mlp_params

import sam_optax


def test_the_first_quarter_of_any_tree():
    batch = {
        "tokens": jnp.arange(24).reshape(8, 3),
        "nested": (jnp.arange(8), [np.arange(8 * 2 * 2 * 2).reshape(8, 2, 2, 2)]),
        "temperature": jnp.float32(0.7),
        "scale": 2.0,
        "nothing": None,
    }
    taken = sam_optax.ascent_batch(batch)
    np.testing.assert_array_equal(taken["tokens"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(taken["nested"][0], [0, 1])
    assert taken["nested"][1][0].shape == (2, 2, 2, 2)
    assert taken["temperature"] == jnp.float32(0.7) and taken["scale"] == 2.0
    assert jax.tree.structure(taken) == jax.tree.structure(batch)


@pytest.mark.parametrize(
    ("b", "fraction", "shards", "taken"),
    [
        (8, 0.5, 1, [0, 1, 2, 3]),
        (8, 0.5, 2, [0, 1, 4, 5]),
        (8, 0.25, 4, [0, 2, 4, 6]),
        (8, 0.25, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # one from each shard at least
        (8, 1.0, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 0.25, 1, [0]),
        (10, 0.25, 1, [0, 1, 2]),  # 2.5 is rounded up
        (5, 0.25, 1, [0]),
        (12, 0.5, 3, [0, 1, 4, 5, 8, 9]),
    ],
)
def test_each_data_shard_gives_its_own_first_examples(b, fraction, shards, taken):
    result = sam_optax.ascent_batch(jnp.arange(b), fraction, data_shards=shards)
    assert result.tolist() == taken


@pytest.mark.parametrize("axis", [1, -1])
def test_another_batch_axis(axis):
    batch = jnp.arange(16).reshape(2, 8)
    taken = sam_optax.ascent_batch(batch, 0.5, batch_axis=axis, data_shards=2)
    assert taken.tolist() == [[0, 1, 4, 5], [8, 9, 12, 13]]
    ascent, parts = sam_optax.ascent_groups(batch, 0.5, m=2, m_sharpness="foret", batch_axis=axis)
    assert ascent.tolist() == [[[0, 1], [8, 9]], [[4, 5], [12, 13]]]
    assert parts.tolist() == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]


def test_paper_groups_split_the_ascent_micro_batch():
    ascent, parts = sam_optax.ascent_groups(jnp.arange(16), 0.25, m=2)
    assert ascent.tolist() == [[0, 1], [2, 3]] and parts is None


def test_paper_groups_take_an_equal_share_of_every_shard():
    ascent, _ = sam_optax.ascent_groups(jnp.arange(16), 0.5, m=2, data_shards=2)
    assert ascent.tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]]


def test_foret_groups_take_from_their_own_part():
    micro_batches, parts = sam_optax.ascent_groups(jnp.arange(16), 0.25, m=2, m_sharpness="foret")
    assert micro_batches.tolist() == [[0, 1], [8, 9]]
    assert parts.tolist() == np.arange(16).reshape(2, 8).tolist()


def test_foret_groups_take_an_equal_share_of_every_shard():
    micro_batches, parts = sam_optax.ascent_groups(
        jnp.arange(16), 0.5, m=2, m_sharpness="foret", data_shards=2
    )
    assert micro_batches.tolist() == [[0, 1, 8, 9], [4, 5, 12, 13]]
    assert parts.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_keys_are_examples_too():
    keys = jax.random.split(jax.random.key(0), 8)
    taken = sam_optax.ascent_batch(keys, 0.5, data_shards=2)
    expected = keys[jnp.array([0, 1, 4, 5])]
    assert (jax.random.key_data(taken) == jax.random.key_data(expected)).all()
    groups, _ = sam_optax.ascent_groups({"key": keys, "one": keys[0]}, 0.5, m=2)
    assert groups["key"].shape == (2, 2) and groups["one"].shape == (2,)


def test_the_step_takes_what_the_public_function_shows():
    seen = []

    def loss_fn(params, batch):
        seen.append(batch)
        return mlp_loss(params, batch)

    batch = mlp_batch(b=16)
    sam_optax.value_and_grad(loss_fn, data_shards=4)(mlp_params(), batch)
    np.testing.assert_array_equal(seen[0]["x"], sam_optax.ascent_batch(batch, data_shards=4)["x"])
    np.testing.assert_array_equal(seen[0]["x"], batch["x"][jnp.array([0, 4, 8, 12])])
    assert seen[1] is batch


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"x": jnp.ones(8), "y": jnp.ones(4)}, {}, r"\['x'\]: 8, .*\['y'\]: 4"),
        ({}, {}, "no array with a batch axis"),
        ({"t": 1.0}, {}, "no array with a batch axis"),
        (jnp.ones((0, 2)), {}, "b=0"),
        (jnp.ones(8), {"batch_axis": 1}, r"batch has the shape \(8,\)"),
        (jnp.ones(8), {"batch_axis": -2}, r"batch has the shape \(8,\)"),
        (jnp.ones(10), {"data_shards": 4}, "b=10 .* 4 data shards.* 8 or 12"),
        (jnp.ones(3), {"data_shards": 4}, "b=3 .* 4 data shards.*: 4"),
    ],
)
def test_batches_that_cannot_be_divided(batch, options, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.ascent_batch(batch, **options)


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (10, {"m": 2, "ascent_fraction": 0.3}, r"m=2 .* a=3 .*m in \[1, 3\]\.$"),
        (128, {"m": 3}, r"m=3 .* a=32 .*a=30 .*0.234375.* or a=33.*m in \[1, 2, 4, 8, 16, 32\]"),
        (16, {"m": 4, "data_shards": 4}, r"m=4 groups on 4 data shards.*a=16 .*m in \[1\]\.$"),
        (4, {"m": 8, "ascent_fraction": 1}, r"m=8 .*a=4 .*none in this batch; .*\[1, 2, 4\]"),
        (16, {"m": 3, "m_sharpness": "foret"}, r"m=3: .*b=16 .*12 or 24\.$"),
        (33, {"m": 8, "m_sharpness": "foret", "data_shards": 8}, r"b=33 .* 8 data .*: 256\.$"),
        (3, {"m": 2, "ascent_fraction": 1e-9, "data_shards": 2}, "b=3 .*: none near it"),
        (24, {"m": 4, "m_sharpness": "foret", "data_shards": 3}, "m=4 .* 3 data shards .*a=6 "),
        (24, {"m": 5, "m_sharpness": "foret", "data_shards": 3}, "m=5: .* 3 data .*: 60"),
        (
            32,
            {"m": 8, "m_sharpness": "foret", "data_shards": 8},
            r"m=8: .*m in \[1\] can share it and the ascent's a=8.*: 256\. .* group_axes makes",
        ),
        (24, {"m": 4, "m_sharpness": "foret"}, r"m=4 .*a=6 .*a=4 .* or a=8"),
    ],
)
def test_groups_that_cannot_share_evenly(b, options, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.ascent_groups(jnp.ones(b), **options)


def _refusal(divide, b, fraction):
    """Returns what is refused, or None, and how many sizes it proposes, after trying them."""
    try:
        divide(b, fraction)
    except ValueError as error:
        sizes = re.search(r"batch sizes that can: ([\d or]+)\.", str(error))
        proposed = [(int(size), fraction) for size in sizes[1].split(" or ")] if sizes else []
        fractions = re.findall(r"ascent_fraction=([\d.]+)", str(error))
        proposed += [(b, float(other)) for other in fractions]
        for settings in proposed:
            divide(*settings)
        return str(error), len(proposed)
    return None, 0


def test_a_shard_takes_as_many_whether_it_knows_of_the_others():
    # 0.35 * 90 / 3 is 10.499999999999998 to Python, and 0.35 * 30 is 10.5.
    batch = jnp.arange(90)
    of_all = sam_optax.ascent_batch(batch, 0.35, data_shards=3)
    of_each = [sam_optax.ascent_batch(part, 0.35) for part in batch.reshape(3, 30)]
    np.testing.assert_array_equal(of_all, jnp.concatenate(of_each))


def test_the_sizes_that_are_proposed_work():
    every = itertools.product(
        (0.1, 0.25, 0.3, 1.0), (1, 3, 4), (2, 4, 5), ("paper", "foret"), (30, 64, 100)
    )
    refused = 0
    for fraction, shards, m, form, b in every:
        settings = {"m": m, "m_sharpness": form, "data_shards": shards}

        def divide(b, fraction, settings=settings):
            groups = functools.partial(sam_optax.ascent_groups, **settings)
            jax.eval_shape(lambda x: groups(x, fraction), jax.ShapeDtypeStruct((b,), "float32"))

        message, proposed = _refusal(divide, b, fraction)
        refused += message is not None
        assert message is None or proposed or "none in this batch" in message
    assert refused > 100


@pytest.mark.parametrize("form", ["paper", "foret"])
def test_the_sizes_that_are_proposed_work_with_accumulation_too(form):
    settings = {"m": 4, "m_sharpness": form, "accumulation_steps": 3, "data_shards": 2}

    def divide(b, fraction):
        gradient = sam_optax.value_and_grad(mlp_loss, 0.1, fraction, **settings)
        jax.eval_shape(gradient, mlp_params(), mlp_batch(b=b))

    message, proposed = _refusal(divide, 34, 0.25)
    assert message.startswith("accumulation_steps=3: ") and proposed == (
        2 if form == "paper" else 1
    )


def test_the_nearest_sizes_are_proposed():
    settings = {"m": 4, "m_sharpness": "foret", "accumulation_steps": 6}
    with pytest.raises(ValueError, match=r"^accumulation_steps=6: .* can: 24 or 36\."):
        sam_optax.value_and_grad(mlp_loss, 0.1, 1.0, **settings)(mlp_params(), mlp_batch(b=34))


def test_strings_are_not_examples():
    with pytest.raises(TypeError, match=r"\['text'\] is 'hello'"):
        sam_optax.ascent_batch({"x": jnp.ones(8), "text": "hello"})


def test_the_numbers_of_groups_that_are_proposed_work():
    batch = jnp.ones(22)  # of which 6 ascend
    with pytest.raises(ValueError, match=r"or, at a=6, m in \[1, 2\]"):
        sam_optax.ascent_groups(batch, m=11, m_sharpness="foret")
    with pytest.raises(ValueError, match=r"m=3: .*; m in \[1, 2\] can"):
        sam_optax.ascent_groups(batch, m=3, m_sharpness="foret")
    for m in (1, 2):
        sam_optax.ascent_groups(batch, m=m, m_sharpness="foret")


def test_the_numbers_of_micro_batches_that_are_proposed_work():
    def step(k):
        gradient = sam_optax.value_and_grad(mlp_loss, data_shards=2, accumulation_steps=k)
        jax.eval_shape(gradient, mlp_params(), mlp_batch(b=24))

    with pytest.raises(ValueError, match=r"; accumulation_steps in \[1, 2, 3, 4, 6, 12\] can\."):
        step(8)
    for k in (1, 2, 3, 4, 6, 12):
        step(k)


@pytest.mark.parametrize("shards", [None, 2])
def test_numpy_arrays_stay_numpy_arrays(shards):
    batch = {"x": np.arange(8), "words": np.array(list("abcdefgh")), "one": 2.0}
    batch["images"] = np.ones((8, 2, 2))
    taken = sam_optax.ascent_batch(batch, 0.5, data_shards=shards)
    assert taken["words"].tolist() == list("abef" if shards else "abcd")
    assert type(taken["x"]) is type(taken["images"]) is np.ndarray and type(taken["one"]) is float


def test_all_of_the_batch_is_the_batch_itself():
    batch = mlp_batch()
    assert sam_optax.ascent_batch(batch, 1) is batch
