"""Impossible values of the settings of figures."""

from __future__ import annotations

from entprune_ds.config_schema import Config

METRICS = ("fid", "kid", "sfid", "is", "precision_recall")
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
PRECISIONS = ("fp32", "tf32", "bf16")


def evaluation_problems(config: Config) -> list[str]:
    """One line per problem."""
    evaluate, found = config.evaluate, []
    if evaluate.extractor not in ("digits", "inception") and not evaluate.extractor.endswith((".py", ".pt", ".pth")):
        message = "`evaluate.extractor` must be digits, inception, or a .py or .pt file, "
        found.append(message + f"got {evaluate.extractor or 'nothing'}.")
    if evaluate.mode not in MODES:
        found.append(f"`evaluate.mode` must be one of {', '.join(MODES)}, got {evaluate.mode}.")
    for key, known in (("metrics", METRICS), ("latency_precisions", PRECISIONS)):
        unknown = [str(value) for value in getattr(evaluate, key) if value not in known]
        if unknown:
            found.append(f"`evaluate.{key}` must be some of {', '.join(known)}, got {', '.join(unknown)}.")
    for key in ("neighbours", "batch_size"):
        if getattr(evaluate, key) < 1:
            found.append(f"`evaluate.{key}` must be above 0, got {getattr(evaluate, key)}.")
    if not 0 <= evaluate.kid_seed < 2**32:
        found.append(f"`evaluate.kid_seed` must lie in [0, 2^32), got {evaluate.kid_seed}.")
    for key in ("latency_precisions", "latency_compile"):
        if not getattr(evaluate, key):
            found.append(f"`evaluate.{key}` must not be empty.")
    wrong = [depth for depth in evaluate.latency_depths if depth < 1]
    if wrong:
        found.append(f"`evaluate.latency_depths` must be above 0, got {wrong}.")
    return found
