import peft  # noqa: F401  before any tuner: once it is there, the adapters register themselves (headtune/peft_types.py)
