"""Intervals, tests and verdicts over members. No torch here."""
