"""``python -m specstream_mlx`` is the program ``specstream-mlx``."""

import sys


def main() -> int:
    """Run the command line; the runtime library itself does not depend on it."""
    from specstream_cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
