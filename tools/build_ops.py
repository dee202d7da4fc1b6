"""Compile DeepSpeed's shared-memory communication op and its CPU Adam now, so that no training run waits for them.

Part of the installation. A lock that a killed build left behind would stall every later load; nobody else
builds in this environment's own cache while it is being installed, so such a lock is removed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from entprune_ds import comm


def main() -> None:
    """Build what is missing."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    comm.prepare_environment()
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)
    print(f"operators ready in {os.environ['TORCH_EXTENSIONS_DIR']}")


if __name__ == "__main__":
    main()
