"""Commands that a launcher may start on many ranks: join them, say once what went wrong, leave."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from entprune_ds.cli.common import refuse
from entprune_ds.redact import redacted


def run_launched(work: Callable[[], None], timeout_seconds: int) -> int:
    """Do the work of this rank, in the process group of its launcher where there is one.

    Args:
        work: called on every rank.
        timeout_seconds: longest wait in a collective.

    Returns:
        The exit status: 0 done, 1 failed on the way, 2 refused.
    """
    from entprune_ds import comm
    from entprune_ds.cli.train import limit_threads
    from entprune_ds.faults import LOST_PEER

    limit_threads()
    try:
        if "RANK" in os.environ:
            comm.init(timeout_seconds)
        work()
    except comm.DistributedError as error:
        return refuse(str(error).splitlines())
    except (ValueError, OSError) as error:  # all ranks meet the same one
        return refuse(str(error).splitlines())
    except comm.RankError as error:
        print(f"error: rank {comm.rank()}: {redacted(str(error))}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        reason = str(error).splitlines()[0]
        refuse([f"another rank is gone ({reason}). What is finished stays: the same command goes on."])
        return 1
    finally:
        comm.shutdown()
    return 0
