"""A dataset before anybody trains on it: what one small step on each example would do to the reference."""
