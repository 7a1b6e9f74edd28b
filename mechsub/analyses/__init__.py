"""Analyses: one file is one analysis. It reads a run and returns labelled arrays, findings and figures."""
