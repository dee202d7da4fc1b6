"""Examples on disk: write them as WebDataset tars, check them, and stream them in a reproducible order."""
