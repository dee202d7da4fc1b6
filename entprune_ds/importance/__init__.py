"""Scores of blocks and of depths: which block goes (one sweep), when and how many (NTK, ZiCo).

Pure torch. A model is seen only through `parts.Parts`; draws, objectives and projections come as callables.
"""
