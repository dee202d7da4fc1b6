"""What training minimises: draws (noise, t, dropped labels) -> z_t and target -> loss per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entprune_ds.config import DiffusionConfig, ModelConfig
from entprune_ds.diffusion.ddpm import NUM_TIMESTEPS, noised, step_divergence, variational_term
from entprune_ds.diffusion.interpolant import PATHS, expand, training_range
from entprune_ds.diffusion.prediction import loss_weight_of
from entprune_ds.rng import normal_per_slot, uniform_per_slot


@dataclass(frozen=True)
class Draws:
    """One batch at the border of the model.

    z_t (N,C,H,W); t (N,), in [0,1] for SiT, the original timestep 0..999 for DiT; labels (N,) i64; target (N,C,H,W),
    for DiT (N,2C,H,W) with the noise in the first half and the data in the second. teacher, where there is one: its
    whole prediction for these draws.
    """

    z_t: Tensor
    t: Tensor
    labels: Tensor
    target: Tensor
    teacher: Tensor | None = None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What the loss of a prediction takes beside it: (target, t), with a teacher also its prediction."""
        return (self.target, self.t) if self.teacher is None else (self.target, self.t, self.teacher)

    def to(self, device: torch.device, dtype: torch.dtype) -> Draws:
        """Move to a device; z_t takes `dtype`, t and target keep f32 unless `dtype` is f64."""
        wide = torch.promote_types(dtype, torch.float32)
        return Draws(
            self.z_t.to(device, dtype), self.t.to(device, wide), self.labels.to(device), self.target.to(device, wide),
            None if self.teacher is None else self.teacher.to(device, wide),
        )  # fmt: skip

    def split(self, size: int | list[int]) -> list[Draws]:
        """Micro-batches of `size` examples, or of these sizes."""
        columns = [column.split(size) for column in vars(self).values() if column is not None]
        return [Draws(*parts) for parts in zip(*columns, strict=True)]


class Objective(Protocol):
    """A generative process as training, validation and scoring see it."""

    def make_draws(
        self, latents: Tensor, labels: Tensor, slots: Sequence[int], *, seed: int, purpose: str, step: int,
        label_dropout: float = 0.0, null_label: int = -1, t: Tensor | None = None,
    ) -> Draws:  # fmt: skip
        """Draw noise, t and label dropout for a batch; every example has its own streams.

        Args:
            latents: data (N,C,H,W) f32.
            labels: (N,) i64.
            slots: positions of the examples in the global batch; with `step` they name the streams.
            seed, purpose, step: see rng.generator_for.
            label_dropout: probability of replacing a label by `null_label`.
            null_label: index of the null label.
            t: (N,) in [0, 1), chosen places in the training range in place of drawn ones: t of SiT, timestep / 1000 of
                DiT.
        """

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Loss per example (N,) f32 or f64 of a whole prediction; target and t as in Draws."""

    def scoring_loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The same for a prediction (N,C,H,W) without a learned-variance half, as Parts.head gives it."""

    def output_loss(self, prediction: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
        """Distance (N,) of a whole prediction from the teacher's, in the units of `loss`; 0 where they are equal."""


def build_objective(model: ModelConfig, diffusion: DiffusionConfig) -> Objective:
    """The objective of a configuration: DiffusionObjective for process=dit, FlowObjective for process=sit."""
    if model.process == "dit":
        return DiffusionObjective(model.in_channels)
    return FlowObjective(diffusion.path, diffusion.prediction, diffusion.loss_weight)


@dataclass(frozen=True)
class FlowObjective:
    """SiT: interpolant, t ~ U(t0, t1), velocity, score or noise prediction (arXiv 2401.08740, eq. 6, 7).

    The target is the velocity of velocity models, and the noise of the others.
    """

    path: str = "linear"
    prediction: str = "velocity"
    loss_weight: str = "none"

    def make_draws(
        self, latents: Tensor, labels: Tensor, slots: Sequence[int], *, seed: int, purpose: str, step: int,
        label_dropout: float = 0.0, null_label: int = -1, t: Tensor | None = None,
    ) -> Draws:  # fmt: skip
        """See Objective."""
        noise, uniform, labels = _random(latents, labels, slots, seed, purpose, step, label_dropout, null_label)
        start, end = training_range(self.path, self.prediction)
        t = (uniform if t is None else t.to(uniform)) * (end - start) + start
        z_t, velocity = PATHS[self.path].mix(latents, noise, t)
        return Draws(z_t, t, labels, velocity if self.prediction == "velocity" else noise)

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the velocity, or the weighted one of the noise; see Objective."""
        prediction = _at_least_single(prediction)
        if self.prediction == "velocity":
            return mean_square(prediction - target)
        c = PATHS[self.path].at(expand(t.to(prediction), prediction))
        noise = prediction if self.prediction == "noise" else -c.sigma * prediction
        return mean_square(noise - target, loss_weight_of(self.loss_weight, c))

    def scoring_loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """See Objective; a flow model has no variance half, so this is the loss."""
        return self.loss(prediction, target, t)

    def output_loss(self, prediction: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
        """See Objective; the loss with the teacher's velocity, or the noise that it implies, as the target."""
        teacher = _at_least_single(teacher)
        if self.prediction == "score":
            teacher = -PATHS[self.path].at(expand(t.to(teacher), teacher)).sigma * teacher
        return self.loss(prediction, teacher, t)


@dataclass(frozen=True)
class DiffusionObjective:
    """DiT: uniform timesteps, squared error of epsilon + variational term with epsilon detached (arXiv 2102.09672).

    The term is the one of the drawn timestep in bits per element, with weight 1: what the official code minimises,
    and what the paper writes as 0.001 L_vlb with L_vlb the sum over 1000 timesteps.
    """

    channels: int
    """C: channels of epsilon."""

    def make_draws(
        self, latents: Tensor, labels: Tensor, slots: Sequence[int], *, seed: int, purpose: str, step: int,
        label_dropout: float = 0.0, null_label: int = -1, t: Tensor | None = None,
    ) -> Draws:  # fmt: skip
        """See Objective."""
        noise, uniform, labels = _random(latents, labels, slots, seed, purpose, step, label_dropout, null_label)
        uniform = uniform if t is None else t
        timesteps = (uniform.double() * NUM_TIMESTEPS).long()  # float64: the product stays below 1000
        z_t = noised(latents, noise, timesteps)
        return Draws(z_t, timesteps.to(latents.dtype), labels, torch.cat([noise, latents], dim=1))

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """See Objective; prediction and target (N,2C,H,W)."""
        epsilon, logits = _at_least_single(prediction).split(self.channels, dim=1)
        noise, data = target.to(epsilon).split(self.channels, dim=1)
        bound = variational_term(epsilon.detach(), logits, noise, data, t.to(epsilon.device).long())
        return mean_square(epsilon - noise) + bound

    def scoring_loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of epsilon alone; see Objective."""
        return mean_square(_at_least_single(prediction) - target[:, : self.channels])

    def output_loss(self, prediction: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
        """Squared error of epsilon + KL of the teacher's step from ours with epsilon detached; see Objective."""
        epsilon, logits = _at_least_single(prediction).split(self.channels, dim=1)
        wanted, wanted_logits = teacher.to(epsilon).split(self.channels, dim=1)
        timesteps = t.to(epsilon.device).long()
        divergence = step_divergence(epsilon.detach(), logits, wanted, wanted_logits, timesteps)
        return mean_square(epsilon - wanted) + divergence


def mean_square(difference: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Weighted mean over the elements of each example, (N,C,H,W) -> (N,); weight (N,1,1,1) or a number."""
    return (weight * difference.square()).flatten(1).mean(dim=1)


def _at_least_single(prediction: Tensor) -> Tensor:
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _random(
    latents: Tensor, labels: Tensor, slots: Sequence[int], seed: int, purpose: str, step: int, label_dropout: float,
    null_label: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Noise (N,C,H,W), uniform numbers for t (N,) in [0, 1), and labels (N,) of which some are dropped."""
    slots = list(slots)
    noise = normal_per_slot(seed, f"{purpose}/noise", step, slots, tuple(latents.shape[1:]))
    uniform = uniform_per_slot(seed, f"{purpose}/t", step, slots)
    if label_dropout > 0:
        dropped = uniform_per_slot(seed, f"{purpose}/label_dropout", step, slots) < label_dropout
        labels = torch.where(dropped, null_label, labels)
    return noise, uniform, labels
