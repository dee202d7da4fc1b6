"""The training command with a DeepSpeed that lacks what we rely on; test_faults.py starts it in the command's place."""

from __future__ import annotations

from entprune_ds import comm
from entprune_ds.cli.common import leave

if __name__ == "__main__":
    comm.prepare_environment()
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from entprune_ds.cli.train import main
    from entprune_ds.engine import pipeline, state

    for needed, owner in ((state.NEEDED, "DeepSpeedZeroOptimizer"), (pipeline.NEEDED, PipelineEngine)):
        needed[owner] = (*needed[owner], "gone_in_a_later_version")
    leave(main())
