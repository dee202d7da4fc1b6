"""Gates of soft pruning in a live engine, and their way into the sharded weights, moments and EMA."""

from __future__ import annotations

import torch

from entprune_ds import comm
from entprune_ds.engine.build import Engine
from entprune_ds.engine.state import push_weights, state_tensor
from entprune_ds.pruning.folding import Gates, column_factors, elements

POWERS = {"weight": 1, "ema": 1, "exp_avg": -1, "exp_avg_sq": -2}
"""A gradient by m W is 1 / m of that by W."""


def set_gates(engine: Engine, gates: Gates) -> None:
    """Train, score and sample with these gates from now on; blocks that are not named lose theirs. Local."""
    engine.gates = {
        b: {kind: gate.to(comm.device(), torch.float32) for kind, gate in of_block.items()}
        for b, of_block in gates.items()
        if b in engine.kept_blocks
    }
    model = engine.ds.module if engine.cut is None else engine.ds.module.part
    for name, block in model.blocks.items():
        block.set_gates({kind: gate.to(engine.dtype) for kind, gate in engine.gates.get(int(name), {}).items()})


@torch.no_grad()
def fold_gates(engine: Engine) -> None:
    """Multiply every gate into the projection behind it, in this rank's pieces of the state; there are none then.

    Outputs stay what they are, and Adam goes on as if the weights had always been these. A unit whose gate is 0 is to
    be removed: it keeps its moments. Collective.
    """
    head_size = engine.model_config.head_size
    for piece in engine.pieces:
        factors = column_factors(piece.name, engine.gates, head_size)
        if factors is None:
            continue
        of_piece = elements(factors, piece.start, piece.stop)
        nonzero = torch.where(of_piece == 0, 1, of_piece)
        for key, power in POWERS.items():
            state = state_tensor(piece, key, engine.optimizer, engine.ema)
            state.mul_((of_piece if power == 1 else nonzero**power).to(state.device))
    set_gates(engine, {})
    push_weights(engine.ds)
