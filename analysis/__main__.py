"""`accelerate launch -m headtune.analysis identify ...`: the command line, in as many processes as were launched."""

import sys

from ..train.cli import main  # the one place where analysis looks up: an entry point, imported by nothing

sys.exit(main())
