"""``python -m llmc``, and the command ``llmc``."""

import atexit
import gc
import sys

from .cli import main


def run() -> None:
    """Run the command line and end the process."""
    # An interpreter that ends looks for garbage among all objects, a million of the libraries': a second for nothing.
    atexit.register(gc.freeze)
    sys.exit(main())


if __name__ == "__main__":
    run()
