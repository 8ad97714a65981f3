"""Shares of an array's tasks and their ranks: every item once."""

from __future__ import annotations

import pytest

from drama_dist.distributed import ranks
from drama_dist.run.shares import WHOLE, Share


@pytest.mark.parametrize(("tasks", "world"), [(1, 1), (1, 3), (4, 1), (4, 2), (3, 5)])
def test_tasks_and_ranks_together_have_every_item_once(tasks: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    for count in (0, 1, 7, 64):
        shares = []
        for task in range(tasks):
            for rank in range(world):
                monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
                shares.append(list(Share(task, tasks).indices_of(count)))
        assert sorted(index for share in shares for index in share) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_are_read_and_wrong_ones_refused() -> None:
    assert Share.read("3/8") == Share(3, 8) and not Share.read("3/8").whole
    assert Share.read("0/1") == WHOLE and WHOLE.whole
    for text in ("8/8", "0/0", "-1/8", "1", "/8", "$SLURM_ARRAY_TASK_ID/8"):
        with pytest.raises(ValueError, match=r"expected INDEX/COUNT .* for example 0/8"):
            Share.read(text)
