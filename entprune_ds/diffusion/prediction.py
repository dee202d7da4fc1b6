"""What a flow model predicts (velocity, score or noise), turned into the velocity and the score of the flow.

All follow from z_t = alpha data + sigma noise with score = -E[noise | z_t] / sigma (SiT, arXiv 2401.08740, eq. 4, 9).
"""

from __future__ import annotations

from torch import Tensor

from entprune_ds.diffusion.interpolant import Coefficients

PREDICTIONS = ("velocity", "score", "noise")


def velocity_of(kind: str, c: Coefficients, z_t: Tensor, prediction: Tensor) -> Tensor:
    """Velocity (N,C,H,W) of a prediction of `kind` at z_t (N,C,H,W); c holds (N,1,1,1) coefficients.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "velocity":
        return prediction
    if kind == "score":
        return c.growth * z_t + c.score_factor * prediction
    if kind == "noise":
        return c.growth * z_t - c.score_factor / c.sigma * prediction
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {kind!r}.")


def score_of(kind: str, c: Coefficients, z_t: Tensor, prediction: Tensor) -> Tensor:
    """Score (N,C,H,W) of a prediction of `kind`; arguments as `velocity_of`. Infinite where sigma is 0.

    From a velocity the noise is eliminated without dividing by alpha, so that t = 0 is no special case.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "velocity":
        wronskian = c.d_alpha * c.sigma - c.alpha * c.d_sigma
        return (c.alpha * prediction - c.d_alpha * z_t) / (c.sigma * wronskian)
    if kind == "score":
        return prediction
    if kind == "noise":
        return -prediction / c.sigma
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {kind!r}.")


def loss_weight_of(kind: str, c: Coefficients) -> Tensor | float:
    """Weight of the squared noise error of score and noise models over t: none, velocity or likelihood.

    `velocity` makes it the squared velocity error, `likelihood` that of maximum likelihood (SiT, sec. 3.2).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "none":
        return 1.0
    if kind == "velocity":
        return (c.score_factor / c.sigma) ** 2
    if kind == "likelihood":
        return c.score_factor / c.sigma**2
    raise ValueError(f"loss_weight must be none, velocity or likelihood, got {kind!r}.")
