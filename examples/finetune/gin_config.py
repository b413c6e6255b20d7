"""Reads an `Experiment` from gin files and `--gin.name=value` overrides."""

import logging
from pathlib import Path

import gin

from finetune.experiment import Experiment
from finetune.model import T5Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

gin.external_configurable(Experiment, module="finetune")
gin.external_configurable(T5Config, module="finetune")


class ConfigError(ValueError):
    """A gin file or override that cannot be used, in words for the user."""


def read_experiment(files: list[str], overrides: list[str]) -> Experiment:
    """Parses `files` in order, then `overrides` such as `rho=0.05` or `T5Config.d_model=64`."""
    gin.clear_config()
    gin.add_config_file_search_path(str(CONFIGS))
    # Gin logs every place it does not find a file in, and raises if that was the last one.
    logging.disable(logging.ERROR)
    try:
        gin.parse_config_files_and_bindings(files, None, finalize_config=False)
        for binding in overrides:
            _check_known_macro(binding)
            try:
                gin.parse_config(binding)
            except SyntaxError as error:
                raise ConfigError(f"--gin.{binding} is not in gin's syntax: {error}") from error
        return gin.get_configurable(Experiment)()
    except (ValueError, TypeError, NameError, SyntaxError, OSError) as error:
        # Gin appends "In call to configurable ..." lines; the first one says what is wrong.
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    finally:
        logging.disable(logging.NOTSET)


def _check_known_macro(binding: str) -> None:
    """Gin takes `rhoo=0.1` for a new macro that nobody reads; here it is a mistake."""
    name, equals, _ = binding.partition("=")
    if not equals:
        raise ConfigError(f"--gin.{binding} has no value; write --gin.{binding}=VALUE")
    if "." in name or "/" in name:
        return  # a parameter: gin itself rejects unknown ones
    try:
        gin.query_parameter(f"{name.strip()}/gin.macro.value")
    except ValueError:
        raise ConfigError(
            f"--gin.{binding}: there is no setting {name.strip()!r}; it has {_macro_names()}"
        ) from None


def _macro_names() -> str:
    lines = gin.config_str().splitlines()
    names = [line.split(" = ")[0] for line in lines if " = " in line and "." not in line.split()[0]]
    return ", ".join(sorted(names))
