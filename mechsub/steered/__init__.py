"""Steering in a run: its models' directions, how they lie to each other, and what changing activations along them does."""
