"""Print the folder of the T5X configs: `--gin_search_paths=$(python -m sam_optax.gin_path)`."""

import sys
from pathlib import Path


def gin_path() -> Path:
    """Return the folder of the gin files, `t5x_configs`, which is installed beside the package.

    Raises:
      FileNotFoundError: it is not there.
    """
    path = Path(__file__).resolve().parent.parent / "t5x_configs"
    if not (path / "sam.gin").is_file():
        raise FileNotFoundError(
            f"The gin files of sam_optax should be in {path}, and are not: install sam_optax again."
        )
    return path


def _main() -> None:
    try:
        print(gin_path())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
