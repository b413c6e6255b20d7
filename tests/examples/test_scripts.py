"""The scripts under examples/ run at a small setting, and what they print is what they claim."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "optax_chain",
    "flax_linen",
    "flax_nnx",
    "equinox_module",
    "sharded",
    "lora",
    "digits",
    "plot_sharpness",
)


def path_of(script):
    return ROOT / "examples" / f"{script}.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process, and return what it prints."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(path_of(script)), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_optax_chain(run):
    first, *_, last, accuracy = run("optax_chain", "--steps", "60").splitlines()[1:]
    _, ascent_loss, descent_loss, cosine, length, skipped = numbers(last)
    assert descent_loss < 0.7 * numbers(first)[2]
    assert 0 < ascent_loss < numbers(first)[1]
    assert 0.3 < cosine < 1 and length == pytest.approx(1, abs=2e-3) and skipped == 0
    assert numbers(accuracy)[0] > 75


@pytest.mark.parametrize("script", ["flax_linen", "flax_nnx", "equinox_module"])
def test_framework(run, script):
    """Both trainings learn; SAM's first loss is at the worse point near the same weights."""
    plain, sam = run(script, "--steps", "60").splitlines()
    assert plain.startswith("plain: ") and sam.startswith("SAM: ")
    (plain_first, _, plain_last, *_, plain_accuracy) = numbers(plain)
    (sam_first, _, sam_last, *_, sam_accuracy) = numbers(sam)
    assert plain_first < sam_first < plain_first + 0.3
    assert plain_last < 0.3 * plain_first and sam_last < 0.3 * sam_first
    assert min(plain_accuracy, sam_accuracy) > 85


def test_lora(run):
    before, _, plain, sam = run("lora", "--pretraining-steps", "200", "--steps", "60").splitlines()
    before = numbers(before)[0]
    assert numbers(plain)[0] == 0 < numbers(sam)[0]
    assert max(numbers(plain)[1:] + numbers(sam)[1:]) < before - 0.05
    for without, with_sam in zip(numbers(plain)[1:], numbers(sam)[1:], strict=True):
        assert with_sam != without


def test_digits(run):
    title, sam, *plains = run("digits", "--seeds", "2", "--steps", "60").splitlines()
    assert title.startswith("test accuracy in %") and "2 seeds" in title
    _, steps, sam_accuracy, error = numbers(sam)
    assert steps == 60 and sam_accuracy > 60 and error < 15
    for steps, line in zip((30, 60, 75), plains, strict=True):
        its_steps, accuracy, _, gain, _ = numbers(line)
        assert its_steps == steps
        assert gain == pytest.approx(sam_accuracy - accuracy, abs=0.02)
        assert gain != 0


def test_plot_sharpness(run, tmp_path):
    picture = tmp_path / "sharpness.png"
    small = ("--steps", "150", "--points", "3", "--output", str(picture))
    plain, sam, _ = run("plot_sharpness", *small).splitlines()
    assert picture.read_bytes().startswith(b"\x89PNG")
    (plain_top, _, plain_rise), (sam_top, _, sam_rise) = numbers(plain), numbers(sam)
    assert 0 < sam_top < plain_top and 0 < sam_rise < plain_rise


def test_sharded():
    # It chooses its devices itself, so it needs a process of its own.
    env = os.environ | {"XLA_FLAGS": re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])}
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache"]
    command = [sys.executable, *warnings, str(path_of("sharded")), "--steps", "30"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    devices, batch, exact, groups = done.stdout.splitlines()
    assert numbers(devices) == [8, 4, 2]
    assert numbers(batch) == [64, 16]
    for line in (exact, groups):
        first, _, last, _ = numbers(line)
        assert last < 0.7 * first
    assert exact.split("loss")[1] != groups.split("loss")[1]  # groups are another algorithm


@pytest.mark.parametrize(
    ("script", "argument", "value"),
    [
        *((script, "--steps", "0") for script in SCRIPTS),
        ("lora", "--pretraining-steps", "0"),
        ("digits", "--seeds", "1"),
        ("digits", "--label-noise", "2"),
        ("plot_sharpness", "--points", "1"),
        ("sweep_rho", "--rhos", "-1"),
        ("sweep_rho", "--seeds", "-1"),
        ("digits", "--first-seed", "-1"),
        ("plot_sharpness", "--output", "loss.bmp"),
    ],
)
def test_a_setting_out_of_its_range_is_named(run, capsys, script, argument, value):
    with pytest.raises(SystemExit, match="2"):
        run(script, argument, value)
    *_, error = capsys.readouterr().err.splitlines()
    assert "error: " in error and argument in error and "unrecognized" not in error


@pytest.mark.parametrize("script", [*SCRIPTS, "finetune_t5"])
def test_script_has_a_page_that_shows_it(script):
    page = (ROOT / "docs" / "examples" / f"{script}.md").read_text()
    assert len(re.findall(r"^# ", page, flags=re.MULTILINE)) == 1
    assert f"{{literalinclude}} ../../examples/{script}.py" in page
    assert f"python {script}.py" in page or f"python examples/{script}.py" in page
    assert f"{script}.py" in (ROOT / "examples" / "README.md").read_text()


def test_every_script_is_here():
    on_disk = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert on_disk == {*SCRIPTS, "finetune_t5", "sweep_rho"}
