import pytest
from finetune.gin_config import CONFIGS, ConfigError, read_experiment


def test_default_file_and_overrides():
    default = read_experiment(["cmudict.gin"], [])
    changed = read_experiment(["cmudict.gin"], ["rho=0.7", "d_model=96", "dtype='bfloat16'"])
    assert (changed.rho, changed.model.d_model, changed.model.dtype) == (0.7, 96, "bfloat16")
    assert changed.steps == default.steps and default.rho != 0.7


@pytest.mark.parametrize(
    "name",
    [
        "data_fraction",
        "steps",
        "rho",
        "ascent_fraction",
        "m",
        "seed",
        "learning_rate",
        "batch_size",
    ],
)
def test_every_setting_of_training_is_a_macro(name):
    assert getattr(read_experiment(["cmudict.gin"], [f"{name}=1"]), name) == 1


@pytest.mark.parametrize(
    "name", ["vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_decoder_layers"]
)
def test_every_size_of_the_model_is_a_macro(name):
    assert getattr(read_experiment(["cmudict.gin"], [f"{name}=300"]).model, name) == 300


def test_full_names_work_too():
    changed = read_experiment(["cmudict.gin"], ["T5Config.relative_position_buckets=16"])
    assert changed.model.relative_position_buckets == 16


def test_a_file_of_ones_own_can_include_the_default(tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text("include 'cmudict.gin'\nsteps = 7\n")
    assert read_experiment([str(mine)], []).steps == 7
    assert read_experiment(["cmudict.gin", str(mine)], ["steps=9"]).steps == 9


def test_earlier_settings_do_not_linger():
    read_experiment(["cmudict.gin"], ["T5Config.relative_position_buckets=16"])
    assert read_experiment(["cmudict.gin"], []).model.relative_position_buckets == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rhoo=0.1", "no setting 'rhoo'; it has .*rho, "),
        ("rho", "has no value"),
        ("rho=", "."),
        ("rho='big'", "rho must be a number, but is 'big'"),
        ("rho=big", "--gin.rho=big is not in gin's syntax"),
        ("m=3", "m=3 groups cannot share the ascent micro-batch .* m in"),
        ("steps=1.5", "steps must be a whole number, but is 1.5"),
        ("steps=0", "steps must be more than 0"),
        ("d_model='x'", "d_model must be a whole number"),
        ("data_fraction=5", r"data_fraction must be in \(0, 1\]"),
        ("rho=-1", "must not be negative"),
        ("T5Config.dmodel=3", "dmodel"),
        ("NoSuchThing.x=3", "NoSuchThing"),
    ],
)
def test_a_mistake_is_a_clear_error(override, message):
    with pytest.raises(ConfigError, match=message):
        read_experiment(["cmudict.gin"], [override])


def test_a_missing_file_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"no_such\.gin"):
        read_experiment(["no_such.gin"], [])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.gin")), ids=lambda path: path.name)
def test_every_config_says_what_may_be_changed(path):
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and "changed" in path.read_text()[:600]
    read_experiment([path.name], [])
