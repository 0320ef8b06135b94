"""`python -m headtune COMMAND`: the command line."""

import sys

from headtune.cli.main import main

sys.exit(main())
