"""Reports from results alone: nothing here reads weights or needs torch."""
