"""What a run leaves to look at: metrics.jsonl, Weights & Biases, figures and report.html.

The only room that imports wandb and matplotlib. Everything here runs on rank 0; other ranks hold a null object.
"""
