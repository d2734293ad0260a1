"""`python -m hsa_mini COMMAND`: the command line."""

import sys

from hsa_mini.cli import main

sys.exit(main())
