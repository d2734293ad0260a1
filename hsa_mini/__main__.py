import sys

from hsa_mini.cli.entry import main

sys.exit(main())
