"""Fine-tunes a small T5.1.1 with and without SAM, and compares the two.

    python examples/finetune_t5.py                    # 10 to 15 minutes on two CPU cores
    python examples/finetune_t5.py --smoke            # 1 to 3 minutes; the figures mean nothing
    python examples/finetune_t5.py --gin.rho=0.05     # any setting of examples/configs/cmudict.gin

Both runs have the same seed, batches and code; only the gradient differs. See examples/README.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES))  # for `finetune`, from whichever folder this is run


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the `--gin.NAME=VALUE` overrides without their prefix."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gin_file", action="append", help="a gin file; repeatable (default: cmudict.gin)"
    )
    parser.add_argument("--smoke", action="store_true", help="use smoke.gin, a tiny setting")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run_dir")
    parser.add_argument(
        "--run_dir", type=Path, help="default: runs/finetune_t5, or runs/finetune_t5_smoke"
    )
    parser.epilog = "--gin.NAME=VALUE changes one setting, e.g. --gin.steps=500"
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if not argument.startswith("--gin.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; settings are changed as --gin.NAME=VALUE")
    if options.smoke and options.gin_file:
        parser.error("--smoke is --gin_file=smoke.gin; give one or the other")
    options.gin_file = options.gin_file or ["smoke.gin" if options.smoke else "cmudict.gin"]
    options.run_dir = options.run_dir or Path(f"runs/finetune_t5{'_smoke' * options.smoke}")
    return options, [argument.removeprefix("--gin.") for argument in rest]


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    options, overrides = parse_arguments(arguments)
    # Mistakes in the settings are reported before the slow imports.
    from finetune.gin_config import ConfigError, read_experiment
    from finetune.run_directory import RunDirectoryError, check

    try:
        experiment = read_experiment(options.gin_file, overrides)
        check(options.run_dir, experiment, options.resume)
    except (ConfigError, RunDirectoryError) as error:
        return _fail(error)
    from finetune import quiet_tensorflow

    quiet_tensorflow.load()
    from finetune import command
    from finetune.checkpoints import CheckpointError
    from finetune.experiment import SettingsError
    from finetune.interrupt import Interrupted

    try:
        command.run(experiment, options.run_dir)
    except (CheckpointError, SettingsError) as error:
        return _fail(error)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"\n{stop or 'Stopped'}. To go on, run the same command with --resume:\n")
        print("    " + shlex.join(["python", *sys.argv, *([] if options.resume else ["--resume"])]))
        return 130
    return 0


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
