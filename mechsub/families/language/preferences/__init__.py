"""The packaged preference sets: what a model may prefer, and how it is asked."""
