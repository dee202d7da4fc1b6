"""How to spend a small recovery budget: what predicts the loss after a long recovery, on a trained model.

Keep-sets (evenly spaced, from every criterion of one sweep, random) recover from the same weights. Their loss on fixed
draws of the training shards after a few steps (by batch size and learning rate), and scores that need no step at all,
are compared by rank with the validation loss (EMA weights, other draws, other noise) after a long recovery. Then races
of equal cost are replayed from these curves: few candidates with many steps against many with few.

  OMP_NUM_THREADS=1 python tools/study_race.py --model runs/base/model --data data_digits --json out.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from entprune_ds.calibration import examples_of
from entprune_ds.cli.compare_scores import score_sets
from entprune_ds.config import Config, DataConfig, PruneConfig, RaceConfig, RunConfig, ScoreConfig, TrainConfig
from entprune_ds.coordinator import measuring
from entprune_ds.data.stream import first_examples
from entprune_ds.diffusion.objective import Draws, build_objective
from entprune_ds.engine.ema import ema_decay
from entprune_ds.importance.criteria import RankingRequest
from entprune_ds.importance.keep_sets import Origin, candidates
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.interop.safetensors import open_export
from entprune_ds.interop.source import loaded_model
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.halving import better_half
from entprune_ds.race_plan import FORWARD_SHARE, cost_of, rounds_of
from entprune_ds.race_replicas import Replicas, State, built, mean_loss
from entprune_ds.race_trial import Recovery
from entprune_ds.rng import permutation

SHORT = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80)
"""Recovery steps after which a candidate is judged."""
WAYS = {
    "full": (1.0, 1.0), "quarter": (0.25, 1.0), "eighth": (0.125, 1.0), "quarter, rate x 2": (0.25, 2.0),
    "quarter, rate / 2": (0.25, 0.5),
}  # fmt: skip
"""Share of the global batch, factor of the learning rate."""
JUDGES = (64, 128, 256, 512)
"""Draws that judge."""
FACTORS = (0.001, 0.01, 0.1, 1.0)
"""c of loss - c ||gradient||^2."""
BUDGETS = (15, 30, 60, 120, 240)
"""Steps of one candidate at the full batch that a replayed race may take, its judging included."""
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24)
"""Candidates of a replayed race."""
REPLAYS = 400


Curves = dict[str, list[list[float]]]
"""{draws that judge: losses of every keep-set}."""
BATCH_SIZE = 128


def study_config(model: Path, data: Path, args: argparse.Namespace) -> Config:
    """The digits model's own settings."""
    return Config(
        run=RunConfig(seed=args.seed),
        model=replace(open_export(model).model, weights=""),
        data=DataConfig(shards=str(data / "train"), val_shards=str(data / "val"), num_readers=4, shuffle_buffer=512),
        train=TrainConfig(
            num_steps=2000, global_batch_size=BATCH_SIZE, learning_rate=args.learning_rate, ema_decay=0.995
        ),
        prune=PruneConfig(target_depth=args.target_depth, criterion="recovery_race", num_checks=1),
        score=ScoreConfig(draws=1024, batch_size=128),
        race=RaceConfig(validation_draws=512),
    )


def recovery_of(config: Config, seed: int, validation: Draws) -> Recovery:
    """Recovery steps with draws of their own."""
    seeded = replace(config, run=replace(config.run, seed=seed))
    return Recovery(seeded, 0, 0, build_objective(config.model, config.diffusion), validation)


def fixed_draws(config: Config, shards: str, purpose: str, count: int) -> Draws:
    """Draws that judge."""
    batch = first_examples(shards, count, seed=config.run.seed, purpose=purpose)
    objective = build_objective(config.model, config.diffusion)
    return objective.make_draws(
        batch.latents, batch.labels, range(count), seed=config.run.seed, purpose=purpose, step=0
    )


def state_of_export(model: DiT) -> State:
    """Weights without moments, as a run that starts from an export has them."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    zeros = {n: torch.zeros_like(p) for n, p in weights.items()}
    return State({"weight": weights, "exp_avg": zeros, "exp_avg_sq": zeros}, 0)


def short_curves(config: Config, state: State, sets: list[Origin], judge: Draws, way: str) -> Curves:
    """Losses of every keep-set after each of SHORT steps; at the full batch after those up to half of the last."""
    share, factor = WAYS[way]
    race = replace(config.race, batch_size=share, learning_rate=config.train.learning_rate * factor)
    recovery = recovery_of(replace(config, race=race), config.run.seed, judge)
    trials = Replicas(config.model, state, recovery, 10**9, torch.float32)
    curves: Curves = {str(count): [[] for _ in sets] for count in JUDGES}
    for number, candidate in enumerate(sets):
        model, optimizer = built(config.model.keeping(candidate.kept_blocks), state, config)
        for group in optimizer.param_groups:
            group["lr"] = recovery.learning_rate(0)
        for i, draws in enumerate(recovery.draws(0, SHORT[-1] if share < 1 else SHORT[-1] // 2), 1):
            trials.step(model, optimizer, draws)
            if i in SHORT:
                losses = example_losses(model, recovery)
                for count, of_sets in curves.items():
                    of_sets[number].append(losses[: int(count)].mean().item())
    return curves


@torch.no_grad()
def example_losses(model: DiT, recovery: Recovery) -> Tensor:
    """Loss of every draw that judges, (N,)."""
    draws = recovery.validation
    return recovery.objective.loss(model(draws.z_t, draws.t, draws.labels), draws.target, draws.t)


def without_steps(config: Config, state: State, sets: list[Origin], judge: Draws) -> dict[str, list[float]]:
    """Scores right after the removal: loss, squared gradient norm, and loss - c ||gradient||^2."""
    recovery, losses, norms = recovery_of(config, config.run.seed, judge), [], []
    for candidate in sets:
        model, _ = built(config.model.keeping(candidate.kept_blocks), state, config)
        losses.append(mean_loss(model, recovery))
        loss = recovery.objective.loss(model(judge.z_t, judge.t, judge.labels), judge.target, judge.t).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(sum(g.square().sum().item() for g in gradients))
    found = {"loss after removal": losses, "- ||gradient||^2": [-n for n in norms]}
    for c in FACTORS:
        found[f"loss - {c} ||gradient||^2"] = [a - c * b for a, b in zip(losses, norms, strict=True)]
    return found


def long_losses(config: Config, state: State, sets: list[Origin], judge: Draws, steps: int, seed: int) -> list[float]:
    """Validation loss of the EMA weights after the long recovery."""
    recovery, found = recovery_of(config, seed, judge), []
    trials = Replicas(config.model, state, recovery, 10**9, torch.float32)
    for candidate in sets:
        model, optimizer = built(config.model.keeping(candidate.kept_blocks), state, config)
        ema: list[Tensor] = [p.detach().clone() for p in model.parameters()]
        for i, draws in enumerate(recovery.draws(0, steps)):
            for group in optimizer.param_groups:
                group["lr"] = recovery.learning_rate(i)
            trials.step(model, optimizer, draws)
            torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - ema_decay(0.995, i))
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), ema, strict=True):
                parameter.copy_(average)
        found.append(mean_loss(model, recovery))
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation."""
    return round(float(stats.spearmanr(a, b)[0]), 3)


def replays(way: str, curves: Curves, final: list[float]) -> Iterator[dict[str, Any]]:
    """Races over random subsets of the keep-sets, by budget and number of candidates: what the winner is worth."""
    ranks, share = stats.rankdata(final), WAYS[way][0]
    marks = SHORT[: len(curves[str(JUDGES[0])][0])]
    for budget, judges, count in itertools.product(BUDGETS, JUDGES, COUNTS):
        judging = judges * FORWARD_SHARE / (share * BATCH_SIZE)
        steps = [r for r in marks if all(x.steps in marks for x in rounds_of(count, r))]
        first = max((r for r in steps if share * cost_of(rounds_of(count, r), judging) <= budget), default=None)
        if first is None or count > len(final):
            continue
        rounds, winners = rounds_of(count, first), []
        for replay in range(REPLAYS):
            alive = permutation(0, "study/replay", count, replay, len(final))[:count]
            for turn in rounds:
                losses = [curves[str(judges)][i][marks.index(turn.steps)] for i in alive]
                alive = [alive[i] for i in better_half(losses)]
            winners.append(alive[0])
        yield {
            "budget": budget, "way": way, "judges": judges, "candidates": count, "first_steps": first,
            "cost": round(share * cost_of(rounds, judging), 1),
            "mean_final_loss": statistics.fmean(final[i] for i in winners),
            "mean_rank": statistics.fmean(float(ranks[i]) for i in winners),
        }  # fmt: skip


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="export folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/ shards")
    parser.add_argument("--target-depth", type=int, default=4)
    parser.add_argument("--keep-sets", type=int, default=40)
    parser.add_argument("--long", type=int, default=400, help="steps of the long recovery")
    parser.add_argument("--long-seeds", type=int, default=1, help="long recoveries with other draws, averaged")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--reuse", type=Path, help="JSON of an earlier study of the same keep-sets: its long recoveries"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="short recoveries to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, start = study_config(args.model, args.data, args), time.perf_counter()
    model = loaded_model(open_export(args.model))
    state = state_of_export(model)
    scores = measure_sweep(measuring(ModuleParts(model), config.model.blocks, config, 0, examples_of(config, 0)))
    request = RankingRequest(
        scores=scores, kept_blocks=config.model.blocks, target_depth=args.target_depth, seed=args.seed, check=0,
        explicit_order=(),
    )  # fmt: skip
    sets = candidates(request, args.keep_sets, ("spaced", "criteria", "random"))
    if args.reuse:
        earlier = json.loads(args.reuse.read_text())
        sets = [Origin(tuple(c["kept_blocks"]), c["origin"]) for c in earlier["keep_sets"]]
    judge = fixed_draws(config, config.data.shards, "study/judge", config.race.validation_draws)
    unseen = fixed_draws(config, config.data.val_shards, "study/unseen", 2048)
    seconds = {}

    def timed(name: str, result: Any, since: float) -> Any:
        seconds[name] = round(time.perf_counter() - since, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        return result

    now = time.perf_counter()
    zero = timed("without steps", without_steps(config, state, sets, judge), now)
    now = time.perf_counter()
    of_sets = score_sets(config, model, {str(i): list(c.kept_blocks) for i, c in enumerate(sets)})
    zero |= timed("scores", {n: [scores[n] for scores in of_sets.values()] for n in of_sets["0"]}, now)
    curves = {}
    for way in args.ways:
        now = time.perf_counter()
        curves[way] = timed(way, short_curves(config, state, sets, judge, way), now)
    now = time.perf_counter()
    if args.reuse:
        runs = earlier["final_runs"]
    else:
        seeds = range(args.seed + 1, args.seed + 1 + args.long_seeds)
        runs = [long_losses(config, state, sets, unseen, args.long, seed) for seed in seeds]
    final = timed("long", [statistics.fmean(values) for values in zip(*runs, strict=True)], now)
    rows = {name: spearman(values, final) for name, values in zero.items()}
    table = {
        way: {
            count: [spearman(list(at_step), final) for at_step in zip(*losses, strict=True)]
            for count, losses in c.items()
        }
        for way, c in curves.items()
    }
    raced = [row for way, of_way in curves.items() for row in replays(way, of_way, final)]
    print(f"{len(sets)} keep-sets, depth {config.model.depth} -> {args.target_depth}; Spearman with the final loss")
    for name, rho in rows.items():
        print(f"  {name:36s} {rho:6.3f}")
    for way, of_way in table.items():
        for count, rhos in of_way.items():
            print(
                f"  {way:18s} {count:>4s} draws  "
                + "  ".join(f"{s}: {r:.2f}" for s, r in zip(SHORT, rhos, strict=False))
            )
    for value, (kept, origin) in sorted(zip(final, sets, strict=True)):
        print(f"  {value:.5f}  {origin:12s} {list(kept)}")
    for budget in BUDGETS:
        best = sorted((r for r in raced if r["budget"] == budget), key=lambda r: r["mean_final_loss"])
        for row in best[:8]:
            print("  " + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        found = {
            "keep_sets": [c._asdict() for c in sets], "final": final, "final_runs": runs, "short_steps": SHORT,
            "curves": curves, "zero_shot": zero, "spearman_zero_shot": rows, "spearman": table, "races": raced,
            "seconds": seconds | {"all": round(time.perf_counter() - start, 1)},
        }  # fmt: skip
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
