"""Parameter space: Gram matrices of directions, read once, and the small algebra on them. Knows no family."""
