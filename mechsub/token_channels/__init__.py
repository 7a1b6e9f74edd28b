"""Token channels: what of a run's language models reads and writes tokens, and which part of a model a trait comes through."""
