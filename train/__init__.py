"""Tune, protect, evaluate, track and export identified attention heads."""
