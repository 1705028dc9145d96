"""What holds of `fit` on every rank of a group; run by test_loops_on_ranks.py.

Networks have eight layers and train on the embedded digits, on one rank first.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from stochastic_depth.distributed.world import on_primary, rank, world_size
from stochastic_depth.draw import (
    draw,
    seed_of_rank,
)
from stochastic_depth.errors import RunError
from stochastic_depth.recipes import RECIPES
from stochastic_depth.survival import LinearDecay
from stochastic_depth.train import Config, ModelConfig, Record, Run, SurvivalConfig, open_run
from stochastic_depth.train.config import DistributedConfig
from support.ranks import report
from support.runs import SILENT, assert_same_end, finish, interrupted_and_resumed

BLOCKS, FINAL = 3, 0.3


def config(gate: str = "batch", **distributed: bool) -> Config:
    return replace(
        RECIPES["digits"](),
        model=ModelConfig(depth=8),
        survival=SurvivalConfig(final=FINAL, gate=gate),
        distributed=DistributedConfig(**distributed),
        engine="eager",
        epochs=1,
        evaluate_every=5,
    )


def trained(path: Path, config: Config) -> tuple[Run, list[Record]]:
    return finish(path, config, SILENT)


def same_counts_and_close_losses(records: Sequence[Record], path: Path) -> None:
    expected = open_run(path).records()
    assert len(records) == len(expected) == 2
    for mine, other in zip(records, expected, strict=True):
        assert mine.active_counts == other.active_counts
        assert mine.active_blocks == other.active_blocks
        for name in ("train_loss", "test_loss", "validation_loss"):
            assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=2e-3)


def sample_gates_train_alike_on_all_numbers_of_ranks(folder: Path) -> None:
    """Over the images of all: with BatchNorm of each rank, ranks would drift apart."""
    of_one = config("sample", sync_batchnorm=True)
    _, records = trained(folder / f"sample-{world_size()}", of_one)
    same_counts_and_close_losses(records, folder / "sample-1")


def subset_gates_draw_alike_on_all_numbers_of_ranks(folder: Path) -> None:
    _, records = trained(folder / f"subset-{world_size()}", config("subset"))
    expected = open_run(folder / "subset-1").records()
    assert [r.active_counts for r in records] == [r.active_counts for r in expected]
    assert records[-1].train_loss == pytest.approx(expected[-1].train_loss, rel=0.05)


class Unpicklable(Exception):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} failed with {code}")


def every_error_of_the_first_rank_reaches_all(folder: Path) -> None:
    """Otherwise the other ranks would wait for a result that never comes."""

    def refuse() -> None:
        raise Unpicklable("the disk", 5)

    with pytest.raises(FileNotFoundError, match="none there"):
        on_primary((folder / "none there").lstat)
    kind = Unpicklable if rank() == 0 else RunError
    with pytest.raises(kind, match="the disk failed with 5"):
        on_primary(refuse)


def a_run_with_gates_by_rank_goes_on_bit_for_bit(folder: Path) -> None:
    by_rank = config(rank_gates=True)
    run, records = trained(folder / "by-rank", by_rank)
    other = interrupted_and_resumed(folder / "in-parts", by_rank, stops=[3, 7])
    if dist.get_rank() == 0:
        assert_same_end(run, other)
    survival = tuple(LinearDecay(FINAL)(block, BLOCKS) for block in range(1, BLOCKS + 1))
    drawn = [
        [int(draw(seed_of_rank(0, rank), step, survival).sum()) for step in range(5)]
        for rank in range(world_size())
    ]
    assert drawn[0] != drawn[1]
    counts = Counter(str(active) for of_rank in drawn for active in of_rank)
    assert Counter(records[0].active_counts) == counts
    assert records[0].active_blocks == pytest.approx(sum(map(sum, drawn)) / 5 / world_size())


def balanced_gates_are_counted_alike_where_a_run_is_resumed_before_its_evaluation(
    folder: Path,
) -> None:
    """No step is taken before the gates of the interval are counted."""
    by_sample = config("sample")
    balanced = replace(by_sample, survival=replace(by_sample.survival, balance=True))
    run, _ = trained(folder / "balanced", balanced)
    other = interrupted_and_resumed(folder / "before-evaluation", balanced, stops=[5])
    if dist.get_rank() == 0:
        assert_same_end(run, other)


CHECKS = {
    "one": (
        sample_gates_train_alike_on_all_numbers_of_ranks,
        subset_gates_draw_alike_on_all_numbers_of_ranks,
    ),
    "two": (
        sample_gates_train_alike_on_all_numbers_of_ranks,
        subset_gates_draw_alike_on_all_numbers_of_ranks,
        a_run_with_gates_by_rank_goes_on_bit_for_bit,
        balanced_gates_are_counted_alike_where_a_run_is_resumed_before_its_evaluation,
        every_error_of_the_first_rank_reaches_all,
    ),
}

if __name__ == "__main__":
    report(CHECKS)
