"""Inception v3 as the papers use it, with clean-fid's resizing, from one file on the disk.

Modes of clean-fid (Parmar et al. 2022): `clean` resizes by PIL's antialiased bicubic filter; `legacy_tensorflow` by the
bilinear filter of TensorFlow 1, inside the network, as ADM's evaluator and the papers' tables do; `legacy_pytorch` is
pytorch-fid's network and torch's bilinear filter. The first two share one torchscript file (StyleGAN's translation of
the 2015 graph), the third has weights of its own.

sFID follows ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py): the first 7 channels of
`mixed_6/conv`, 17 x 17 x 7 = 2,023 features in the order H, W, C. The Inception score uses the classifier without its
bias, as there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cleanfid.inception_pytorch
import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer
from torch import Tensor

from entprune_ds import comm
from entprune_ds.atomic import file_sha256
from entprune_ds.evaluation.extractor import Extracted, ImageExtractor, to_float

SIDE = 299
SPATIAL_CHANNELS = 7
SPATIAL_LAYER = "mixed_6"
PROBE_TOLERANCE = 1e-3


def load_inception(path: Path, mode: str) -> ImageExtractor:
    """The torchscript file of clean-fid (inception-2015-12-05.pt) for the modes clean and legacy_tensorflow.

    Features, spatial features and logits come from one pass over the layers. That this walk is what the file itself
    computes is checked here, on a fixed image.

    Raises:
        ValueError: a file that is not this network.
    """
    device = comm.device()
    try:
        net = torch.jit.load(path, map_location=device).eval()
        layers, head = list(net.layers.named_children()), net.output.weight  # (K,D)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise _other_file(path, str(error).strip().splitlines()[-1]) from error
    if SPATIAL_LAYER not in dict(layers):
        raise _other_file(path, f"it has no layer {SPATIAL_LAYER}")
    resize = tensorflow_resize if mode == "legacy_tensorflow" else cleanfid_resize(mode)

    def walk(x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = x
        for name, layer in layers:
            if name == SPATIAL_LAYER:
                spatial = layer.conv(x)[:, :SPATIAL_CHANNELS]  # (n,7,17,17)
            x = layer(x)
        return x.flatten(1), spatial.permute(0, 2, 3, 1).flatten(1)

    def extract(images: np.ndarray) -> Extracted:
        with torch.inference_mode(), _exact_products():
            features, spatial = walk((resize(images) - 128) / 128)
            logits = features @ head.T
        return Extracted(features.cpu().numpy(), spatial.cpu().numpy(), logits.cpu().numpy())

    probe = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    try:
        with torch.inference_mode(), _exact_products():
            inside = net(to_float(probe), return_features=True).flatten(1)
            walked, _ = walk((tensorflow_resize(probe) - 128) / 128)
    except (RuntimeError, AttributeError) as error:
        raise _other_file(path, str(error).strip().splitlines()[-1]) from error
    if float((inside - walked).abs().max()) > PROBE_TOLERANCE * float(inside.abs().max()):
        raise _other_file(path, "its layers in a row do not give its features")
    return ImageExtractor(f"Inception v3 2015-12-05, {path.name}", extract, file_sha256(path)[:16], mode)


def load_pytorch_inception(weights: dict[str, Tensor], path: Path) -> ImageExtractor:
    """pytorch-fid's network (mode legacy_pytorch), by clean-fid's own class, with given weights.

    Args:
        weights: state dict of pt_inception-2015-12-05-6726825d.pth.
        path: where they were read.

    Raises:
        ValueError: weights of another network.
    """
    try:
        with _weights_at_hand(weights):
            net = cleanfid.inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    except RuntimeError as error:
        raise _other_file(path, str(error).strip().splitlines()[-1].strip()) from error
    net = net.eval().to(comm.device())
    resize = cleanfid_resize("legacy_pytorch")

    def extract(images: np.ndarray) -> Extracted:
        with torch.inference_mode(), _exact_products():
            return Extracted(net(resize(images) / 255)[0].flatten(1).cpu().numpy())

    return ImageExtractor(
        f"Inception v3 of pytorch-fid, {path.name}", extract, file_sha256(path)[:16], "legacy_pytorch"
    )


def cleanfid_resize(mode: str) -> Callable[[np.ndarray], Tensor]:
    """uint8 (n,H,W,C) -> f32 (n,3,299,299), 0 to 255, by clean-fid's own code, an image at a time."""
    one = build_resizer(mode)

    def resize(images: np.ndarray) -> Tensor:
        resized = np.stack([one(image) for image in _colour(images)])  # (n,299,299,3)
        return torch.from_numpy(resized).to(comm.device()).permute(0, 3, 1, 2).float()

    return resize


def tensorflow_resize(images: np.ndarray) -> Tensor:
    """The same by TensorFlow 1's tf.image.resize_bilinear, corners not aligned: what the file does itself."""
    x = to_float(_colour(images))  # (n,3,H,W)
    theta = torch.eye(2, 3, device=x.device)
    theta[0, 2] += 1 / x.shape[3] - 1 / SIDE
    theta[1, 2] += 1 / x.shape[2] - 1 / SIDE
    grid = F.affine_grid(theta.expand(len(x), 2, 3), [len(x), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(images: np.ndarray) -> np.ndarray:
    """Grey images (n,H,W,1) as (n,H,W,3)."""
    if images.shape[3] not in (1, 3):
        raise ValueError(f"Inception needs images of 1 or 3 channels, got {images.shape[3]}.")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Features in full fp32, whatever the samples were drawn with."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@contextlib.contextmanager
def _weights_at_hand(weights: dict[str, Tensor]) -> Iterator[None]:
    """Let clean-fid's class take these weights instead of downloading them."""
    module = cleanfid.inception_pytorch
    before = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: weights
    try:
        yield
    finally:
        module.load_state_dict_from_url = before


def _other_file(path: Path, why: str) -> ValueError:
    message = f"`evaluate.inception`: {path} is not the Inception network ({why[:200]}). "
    return ValueError(message + "Give the file that clean-fid uses, or remove it so that it is downloaded again.")
