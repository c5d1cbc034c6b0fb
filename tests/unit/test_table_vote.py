"""Which table the ranks of a group choose by, and when they tune."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import cost_tables, table_store, table_vote
from fusewire.custom_ops.dispatch.table_store import Table
from fusewire.custom_ops.tuning import tuner

from support.distributed import shared_pool
from support.tables import BF16, HIDDEN, chosen, on_rank, times_of

pytestmark = pytest.mark.usefixtures("cache")


def job_choose(caches, tokens):
    with on_rank(caches):
        return chosen(tokens), [info.table for info in api.workspaces()]


def job_key():
    return table_store.key_of([table_store.machine_facts(torch.device("cpu"))] * 2, HIDDEN, BF16)


def write(folder, costs):
    """A table of this machine in a rank's own folder: microseconds by variant, whatever the size."""
    key = shared_pool(2).run(job_key)[0]
    times = {label: ((1, us), (64, us)) for label, us in costs.items()}
    table = Table(key, times, measured=str(costs), seconds=1.0)
    with mock.patch.dict(os.environ, {table_store.CACHE_VARIABLE: str(folder)}):
        return table_store.save(table)


NATIVE_WINS = {"native": 1.0, cost_tables.ONE_SHOT: 9.0, cost_tables.TWO_SHOT: 9.0}
ONE_SHOT_WINS = {"native": 9.0, cost_tables.ONE_SHOT: 1.0, cost_tables.TWO_SHOT: 5.0}
TWO_SHOT_WINS = {"native": 9.0, cost_tables.ONE_SHOT: 5.0, cost_tables.TWO_SHOT: 1.0}


def test_without_a_table_the_shipped_one_serves(cache):
    for served, texts in shared_pool(2).run(job_choose, cache, (1, 8)):
        assert served == [cost_tables.ONE_SHOT] * 2
        assert texts == [""]


def test_ranks_with_different_tables_take_the_first_ranks(cache):
    write(cache / "a", ONE_SHOT_WINS)
    write(cache / "b", TWO_SHOT_WINS)
    answers = shared_pool(2).run(job_choose, [cache / "a", cache / "b"], (1, 8))
    assert [served for served, _ in answers] == [[cost_tables.ONE_SHOT] * 2] * 2
    for _, texts in answers:
        assert "the tuned table of rank 0 is used on every rank: rank(s) 1 had another" in texts[0]
    answers = shared_pool(2).run(job_choose, [cache / "b", cache / "a"], (1, 8))
    assert [served for served, _ in answers] == [[cost_tables.ONE_SHOT, cost_tables.TWO_SHOT]] * 2


def test_a_rank_without_a_table_is_given_one(cache):
    write(cache / "a", TWO_SHOT_WINS)
    for folders, holder, other in (("ab", 0, 1), ("ba", 1, 0)):
        answers = shared_pool(2).run(job_choose, [cache / name for name in folders], (8,))
        assert [served for served, _ in answers] == [[cost_tables.TWO_SHOT]] * 2
        for _, texts in answers:
            assert f"table of rank {holder} is used on every rank: rank(s) {other} had none" in texts[0]


def test_a_damaged_file_on_one_rank_is_made_up_for_and_named(cache):
    write(cache / "a", NATIVE_WINS).write_text("not even JSON")
    write(cache / "b", TWO_SHOT_WINS)
    for served, texts in shared_pool(2).run(job_choose, [cache / "a", cache / "b"], (8,)):
        assert served == [cost_tables.TWO_SHOT]
        assert "rank(s) 0 had none; rank 0:" in texts[0]
        assert "damaged" in texts[0]


def test_damaged_files_on_every_rank_are_ignored_and_named(cache):
    write(cache, NATIVE_WINS).write_text("{}")
    for served, texts in shared_pool(2).run(job_choose, cache, (8,)):
        assert served == [cost_tables.ONE_SHOT]
        assert "rank 0: " in texts[0]
        assert "not a table of fusewire's" in texts[0]


def test_a_tuned_table_may_say_that_nothing_beats_native(cache):
    write(cache, NATIVE_WINS)
    for served, texts in shared_pool(2).run(job_choose, cache, (1, 8)):
        assert served == ["native"] * 2
        assert texts == []  # no workspace was made


def job_opt_in(cache, asking, how):
    """Ask for tuning on some ranks; where the table came from, and what is said."""
    asks = dist.get_rank() in asking
    environment = {table_vote.TUNE_VARIABLE: "1" if asks and how != "prepare" else ""}
    with on_rank(cache, times_of, **environment), mock.patch.object(tuner, "DEFAULT_MAX_TOKENS", 16):
        if how == "first call":
            served = chosen((1, 8))
        else:
            api.prepare(None, HIDDEN, BF16, max_tokens=8, tune=asks and how == "prepare")
            served = chosen((1, 8))
        measured = max((t for found in table_store.all_files() for t, _ in found.table.times["native"]), default=0)
        return served, api.workspaces()[0].table, measured


@pytest.mark.parametrize("how", ["prepare", "prepare by environment", "first call"])
def test_tuning_at_first_use_where_all_ranks_ask(cache, how):
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, (0, 1), how):
        assert served == ["native", cost_tables.TWO_SHOT]
        assert "tuned on this machine" in text
        assert measured == 16  # more than this program's 8: the table is for later ones


@pytest.mark.parametrize("how", ["prepare", "prepare by environment", "first call"])
@pytest.mark.parametrize("asking", [(0,), (1,)])
def test_nobody_tunes_where_ranks_disagree(cache, how, asking):
    silent = 1 - asking[0]
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, asking, how):
        assert served == [cost_tables.ONE_SHOT] * 2
        assert f"nobody tunes: rank(s) {silent} did not ask for it" in text
        assert measured == 0


def test_nobody_tunes_unasked(cache):
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, (), "prepare"):
        assert (served, text, measured) == ([cost_tables.ONE_SHOT] * 2, "", 0)


def job_bad_opt_in(cache):
    with on_rank(cache, **{table_vote.TUNE_VARIABLE: ["maybe", "1"][dist.get_rank()]}):
        return api.prepare(None, HIDDEN, BF16, max_tokens=8)[0]


def test_an_unclear_opt_in_is_named(cache):
    for info in shared_pool(2).run(job_bad_opt_in, cache):
        assert info.max_tokens == 8
        assert "on rank 0: ConfigError: FUSEWIRE_TUNE='maybe' is neither on" in info.table
