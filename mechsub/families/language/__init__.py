"""Causal language models: the trait is a preference, the carrier number sequences that a teacher wrote."""
