"""Runs and conditions side by side, from their results alone; no model is loaded."""
