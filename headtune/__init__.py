"""Find the attention heads that recall and the heads that suppress, prove it causally, and tune exactly those."""

from headtune.peft_types import register

register()
