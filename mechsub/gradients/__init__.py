"""Gradient space: losses example by example, their gradients, and what these say of displacements."""
