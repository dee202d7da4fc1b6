"""Samples and figures: drawing images, writing them, FID, KID, class accuracy and latency (clean-fid, torchvision)."""
