"""Executors run `Stage` objects; they know no stage by name."""
