"""`python -m balancesync`."""

import sys

from balancesync.cli import main

if __name__ == "__main__":
    sys.exit(main())
