"""The built-in feature extractor of 8x8 digits: a small CNN trained in seconds on the training split.

It stands where Inception stands for photographs: FID and KID use its features, class accuracy its logits. Training runs
on one CPU thread with local generators: deterministic, and the global random state stays untouched. Two machines agree
as far as their CPU kernels round alike.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from entprune_ds import logs, rng
from entprune_ds.config import digest
from entprune_ds.evaluation.images import from_uint8, write_whole

SHAPE = (8, 8, 1)  # of one image, (H,W,C)
FEATURES = 64
CLASSES = 10
TRUSTED_ACCURACY = 0.98
FEATURE_VARIANCE = 15.0
"""Mean variance of a feature over the training split. FID grows with the square of the features' scale, which training
leaves to chance, so it is fixed. At this value the FID between training and validation digits is about 12."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on besides data and seed; change `version` with the code of training."""

    version: int = 1
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    shift: int = 1
    noise: float = 0.1
    feature_variance: float = FEATURE_VARIANCE


RECIPE = Recipe()


class DigitNet(nn.Module):
    """Convolutions and one hidden layer: (N,1,8,8) -> features (N,64) -> logits (N,10)."""

    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        stages = [*_stage(1, 32, 1), *_stage(32, 32, 2), *_stage(32, 64, 1)]  # (N,32,8,8), (N,32,4,4), (N,64,4,4)
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(1024, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,10) of images (N,1,8,8) in [-1, 1]."""
        return self.head(self.body(images))


def _stage(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@dataclass(frozen=True)
class Extractor:
    """A trained network as two functions of images."""

    name: str
    """What it is and how it was made; belongs beside every figure."""
    net: DigitNet
    """The network, in eval mode."""
    test_accuracy: float
    """Share of validation images that it classifies rightly."""
    kid_scale: float = FEATURE_VARIANCE**-0.5
    """Factor that brings features to unit variance for KID, whose cubic kernel is not scale-free."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (N,64) f64 after the last ReLU, of images uint8 (N,8,8,1)."""
        return self._apply(lambda x: self.net.body(x).double() * self.net.feature_scale.double(), images)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Class logits (N,10) f64 of images uint8 (N,8,8,1)."""
        return self._apply(lambda x: self.net(x).double(), images)

    def _apply(self, function: Callable[[Tensor], Tensor], images: np.ndarray) -> np.ndarray:
        _check(images, "images")
        with _one_thread(), torch.inference_mode():
            return torch.cat([function(part) for part in from_uint8(images).split(256)]).numpy()


def train_digit_extractor(
    train_images: np.ndarray, train_labels: np.ndarray, val_images: np.ndarray, val_labels: np.ndarray, seed: int = 0
) -> Extractor:
    """Train the extractor; about 4 s on one core for 1,500 images. The validation split only measures.

    Args:
        train_images, val_images: uint8 (N,8,8,1).
        train_labels, val_labels: (N,) integers 0..9.
        seed: seed of the initial weights, the order and the augmentation (shifts by one pixel, noise).

    Raises:
        ValueError: images or labels of another kind, or fewer training images than one batch.
    """
    _check(train_images, "train_images", train_labels)
    if len(train_images) < RECIPE.batch_size:
        raise ValueError(f"the extractor needs {RECIPE.batch_size} training images or more, got {len(train_images)}.")
    images, labels = from_uint8(train_images), torch.from_numpy(train_labels.astype(np.int64))
    with _one_thread():  # another number of threads would sum gradients in another order
        net = _initial_net(seed)
        _fit(net, images, labels, seed)
        with torch.inference_mode():
            variance = net.body(images).double().var(dim=0).mean()
            net.feature_scale.copy_((RECIPE.feature_variance / variance.clamp_min(1e-12)).sqrt())
    return _measured(net, val_images, val_labels, seed)


def load_or_train(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    val_images: np.ndarray,
    val_labels: np.ndarray,
    cache: str | Path,
    seed: int = 0,
) -> Extractor:
    """The extractor of `train_digit_extractor`, kept in the folder `cache` so that it is trained once.

    The file name holds a digest of training data, seed and recipe. A damaged file is reported and replaced.
    """
    data = train_images.tobytes() + train_labels.astype(np.int64).tobytes()
    key = digest(dict(data=hashlib.sha256(data).hexdigest(), seed=seed, recipe=asdict(RECIPE)))
    path = Path(cache) / f"digits_cnn64_{key[:16]}.safetensors"
    if path.is_file() and (net := _load(path)) is not None:
        return _measured(net, val_images, val_labels, seed)
    extractor = train_digit_extractor(train_images, train_labels, val_images, val_labels, seed)
    content = save(extractor.net.state_dict(), {"weights": weights_digest(extractor.net)})
    try:
        write_whole(path, lambda file: file.write(content))
    except ValueError as error:
        logs.get_logger().warning("feature extractor not kept: %s", error)
    return extractor


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of all weights and buffers, by name."""
    parts = (name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(net.state_dict().items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _initial_net(seed: int) -> DigitNet:
    with torch.device("meta"):  # the constructors of layers would draw from the global generator
        net = DigitNet()
    net.to_empty(device="cpu")
    generator = rng.generator_for(seed, "extractor_init")
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    net.feature_scale.fill_(1.0)
    return net


def _fit(net: DigitNet, images: Tensor, labels: Tensor, seed: int) -> None:
    size, epochs = RECIPE.batch_size, RECIPE.epochs
    optimizer = torch.optim.AdamW(net.parameters(), lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    steps = epochs * (len(images) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE.learning_rate, total_steps=steps)
    generator = rng.generator_for(seed, "extractor_training")
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - size + 1, size):
            chosen = order[start : start + size]
            logits = net(_augment(images[chosen], generator))  # (n,10)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    net.requires_grad_(False).eval()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to one pixel (background -1) and add noise; (n,1,8,8) -> (n,1,8,8)."""
    reach, (count, _, height, width) = RECIPE.shift, images.shape
    padded = F.pad(images, [reach] * 4, value=-1.0)[:, 0]
    rows, columns = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)  # (n,H), (n,W)
    shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
    return shifted + RECIPE.noise * torch.randn(shifted.shape, generator=generator)


def _measured(net: DigitNet, images: np.ndarray, labels: np.ndarray, seed: int) -> Extractor:
    """The extractor of a finished network, its accuracy measured, logged and judged."""
    _check(images, "val_images", labels)
    name = f"digits_cnn64 v{RECIPE.version} seed {seed} weights {weights_digest(net)[:12]}"
    extractor = Extractor(name, net, float("nan"))
    accuracy = float((extractor.logits(images).argmax(1) == labels).mean())
    log = logs.get_logger()
    log.info("feature extractor %s: accuracy %.4f on %d validation images", extractor.name, accuracy, len(labels))
    if accuracy < TRUSTED_ACCURACY:
        log.warning("its accuracy is below %.2f: FID, KID and class accuracy mean little", TRUSTED_ACCURACY)
    return replace(extractor, test_accuracy=accuracy)


def _load(path: Path) -> DigitNet | None:
    """The stored network; None, with a warning, if the file is damaged."""
    with torch.device("meta"):
        net = DigitNet()
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable itself)
            stated = (file.metadata() or {}).get("weights")
        net.load_state_dict(state, strict=True, assign=True)
        if weights_digest(net) != stated:
            raise ValueError("its weights do not match their checksum")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        logs.get_logger().warning("feature extractor %s is damaged (%s): training it again", path, error)
        return None
    return net.requires_grad_(False).eval()


def _check(images: np.ndarray, name: str, labels: np.ndarray | None = None) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != SHAPE or len(images) == 0:
        raise ValueError(f"{name} must be digits, uint8 (N,8,8,1), got {images.dtype} {tuple(images.shape)}.")
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{name} needs {len(images)} integer labels, got {labels.dtype} {tuple(labels.shape)}.")
    if labels is not None and (labels.min() < 0 or labels.max() >= CLASSES):
        raise ValueError(f"labels of {name} must lie in 0..{CLASSES - 1}, got {labels.min()}..{labels.max()}.")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread inside, and restore the number after."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
