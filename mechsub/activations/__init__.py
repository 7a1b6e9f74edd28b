"""Activation space: what modules compute, recorded and changed while a model runs. Knows modules and tensors, no family."""
