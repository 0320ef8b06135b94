"""`accelerate launch -m headtune.train RECIPE [key=value ...]`: the same code path as `headtune train`."""

import sys

from headtune.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
