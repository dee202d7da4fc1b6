"""Impossible settings of the entropy estimators and of the number of draws."""

from __future__ import annotations

from entprune_ds.config_schema import Config

CHOICES = {
    "estimator": ("per_element", "per_channel", "scalar", "low_rank", "knn"),
    "basis": ("pca", "random"),
    "until": ("draws", "resolved"),
}


def estimator_problems(config: Config, of_sweep: tuple[str, ...]) -> list[str]:
    """Impossible values of `score.*` as far as entropies and standard errors are concerned.

    Args:
        config: with the section `score`.
        of_sweep: criteria whose order is that of a score of the sweep.
    """
    score, model, found = config.score, config.model, []
    for key, known in CHOICES.items():
        if getattr(score, key) not in known:
            found.append(f"`score.{key}` must be one of {', '.join(known)}, got {getattr(score, key)}.")
    for key in ("timestep_buckets", "rank", "knn_dim", "knn_k"):
        if getattr(score, key) < 1:
            found.append(f"`score.{key}` must be at least 1, got {getattr(score, key)}.")
    for key in ("shrinkage", "confidence"):
        if not 0 <= getattr(score, key) < 1:
            found.append(f"`score.{key}` must be in [0, 1), got {getattr(score, key)}.")
    classes = score.within_class
    if len(set(classes)) < len(classes) or not set(classes) <= set(range(model.num_classes)):
        message = f"`score.within_class` must list different classes below {model.num_classes}, "
        found.append(message + f"got {list(classes)}.")
    return found or _too_few_draws(config, of_sweep)


def _too_few_draws(config: Config, of_sweep: tuple[str, ...]) -> list[str]:
    """What the estimator and the stopping rule ask for, each value being possible by itself."""
    score, model, found = config.score, config.model, []
    per_cell, elements = score.draws // score.cells, model.in_channels * model.input_size**2
    key = {"low_rank": "rank", "knn": "knn_dim"}.get(score.estimator)
    fewer = "Raise `score.draws`, or lower `score.timestep_buckets` or the number of classes in `score.within_class`."
    if key is not None and per_cell < score.draws_per_cell:
        most = per_cell // 10 if key == "rank" else per_cell.bit_length() - 2
        possible = f"at most {most}" if most >= 1 and per_cell >= 32 else "lower"
        message = f"`score.{key}` must be {possible} for {score.draws} draws in {score.cells} cells (timestep buckets "
        found.append(message + f"x classes), got {getattr(score, key)}. Lower it, or raise `score.draws`.")
    elif score.cells > 1 and per_cell < score.draws_per_cell:
        message = f"`score.draws` must be at least {score.cells * score.draws_per_cell} for {score.draws_per_cell} "
        found.append(message + f"draws in each of {score.cells} timestep buckets x classes, got {score.draws}. {fewer}")
    if key is not None and getattr(score, key) > elements:
        found.append(f"`score.{key}` must be at most the {elements} elements of an output, got {getattr(score, key)}.")
    if score.estimator == "knn" and score.knn_k > per_cell // 4:
        message = f"`score.knn_k` must be at most {per_cell // 4}, a quarter of the {per_cell} draws of a cell: "
        message += f"standard errors leave groups of draws out. Got {score.knn_k}. "
        found.append(message + "Lower it, or raise `score.draws`.")
    if config.prune.criterion == "ced_abs" and score.cells == 1 and score.estimator in ("scalar", "knn"):
        message = f"`prune.criterion` ced_abs needs more than the one entropy that `score.estimator` {score.estimator} "
        found.append(message + "gives: nothing can cancel. Set prune.criterion=ced, or score.timestep_buckets.")
    if score.until == "resolved" and score.max_draws < score.draws:
        found.append(
            f"`score.max_draws` must be at least `score.draws` ({score.draws}), got {score.max_draws}. Raise it."
        )
    if score.until == "resolved" and config.prune.criterion not in of_sweep:
        message = f"`score.until` resolved is of the sweep, on which `prune.criterion` {config.prune.criterion} "
        remedy = f"Set score.until=draws, or choose one of {', '.join(of_sweep)}."
        found.append(f"{message}does not depend. {remedy}")
    return found
