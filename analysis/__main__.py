"""`accelerate launch -m headtune.analysis identify ...`: the command line, in as many processes as were launched."""

import sys

from headtune.cli.main import main

sys.exit(main())
