"""Find the attention heads that recall and the heads that suppress, and check them causally."""
