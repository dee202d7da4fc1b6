"""Where an exported model comes from, as W&B shows it: the weights and the data that the run has used.

Online they become inputs of the run, so that the lineage graph joins all runs from the same base and data. The client
cannot record inputs while offline: there the same facts stand in the metadata of the model alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb


def artifact_name(text: str) -> str:
    """A name that W&B takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:128]


def used_artifacts(facts: Mapping[str, Any]) -> list[wandb.Artifact]:
    """The base weights as a reference to where they lie, and the data as its digest.

    Args:
        facts: of the model; reads `base_weights` (a path, or empty for random weights), `data_digest` and `data`.
    """
    import wandb

    used = []
    base = Path(facts["base_weights"]) if facts.get("base_weights") else None
    if base is not None and base.exists():
        artifact = wandb.Artifact(artifact_name(f"base-{base.parent.name}-{base.name}"), type="model")
        artifact.add_reference(base.resolve().as_uri())  # with checksums; nothing is copied
        used.append(artifact)
    if facts.get("data_digest"):
        described = {"digest": facts["data_digest"], "shards": facts.get("data", "")}
        artifact = wandb.Artifact(f"data-{facts['data_digest'][:12]}", type="dataset", metadata=described)
        with artifact.new_file("digest.json") as file:  # by content: the same data is the same version
            file.write(json.dumps({"digest": facts["data_digest"]}))
        used.append(artifact)
    return used
