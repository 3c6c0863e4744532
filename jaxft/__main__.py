"""`python -m jaxft`, the same as the command `jaxft`."""

import sys

from jaxft.cli import main

if __name__ == "__main__":
    sys.exit(main())
