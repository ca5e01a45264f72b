"""`python -m aegaeon` is `aegaeon`."""

import sys

from aegaeon.cli import main

if __name__ == "__main__":
    sys.exit(main())
