"""entprune_ds: prunes whole transformer blocks of diffusion and flow transformers while they train."""

__version__ = "0.1.0"
