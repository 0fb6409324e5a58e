"""A batch cut into micro-batches and dealt to the ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frpo.packing import Pack, Rows, cut_micro_batches, pack_lengths, packs_of, split_ranks
from frpo.types import Sequences


@dataclass(frozen=True)
class Job:
    """How the ranks of a job compute."""

    rank: int
    """This one."""
    world_size: int
    budget_tokens: int
    """Of a micro-batch."""
    reach: int
    """How much masked attention a prompt token is worth; see `Scorer.reach`."""


@dataclass(frozen=True)
class Share:
    """What one rank computes of a batch."""

    micro_batches: list[list[Pack]]
    num_idle: int
    """Passes that other ranks make more."""
    idle: list[Pack]
    """What this one computes meanwhile, and counts nothing of: under ZeRO-2 and 3 a pass is a collective."""


def deal_to_rank(sequences: Sequences, rows: Rows, job: Job) -> Share:
    """This rank's part of some rows. No pack is more than half of a rank's part, so that whole packs can be
    dealt evenly."""
    budget = job.budget_tokens
    if job.world_size > 1:
        budget = min(budget, int(sequences.lengths[rows].sum()) // (2 * job.world_size))
    packs = packs_of(sequences, rows, budget_tokens=budget, reach=job.reach)
    lengths = pack_lengths(sequences, packs)
    cuts: list[list[list[Pack]]] = []
    for mine in split_ranks(lengths, job.world_size):
        cut = cut_micro_batches(lengths[mine], job.budget_tokens)
        cuts.append([_packs_at(packs, mine[at]) for at in cut])
    own = cuts[job.rank]
    most = max(len(cut) for cut in cuts)
    return Share(own, most - len(own), [rows[:1]])


def _packs_at(packs: Sequence[Pack], indices: Rows) -> list[Pack]:
    return [packs[i] for i in indices]
