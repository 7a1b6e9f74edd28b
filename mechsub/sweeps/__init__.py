"""Sweeps: one recipe, several runs that differ in some of its fields, in one folder and one table."""
