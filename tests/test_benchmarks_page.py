"""docs/benchmarks.md is what the peers' JSON files give, and no time counts where results differ."""

import json

import pytest
import torch

from benchmarks.peers import page
from benchmarks.peers.contest import Contest, close, hold


def test_the_page_is_what_the_json_gives():
    assert page.PAGE.read_text() == page.render(), "python -m benchmarks.peers.page writes it anew"


def row(rival, times, ours=False, result="", rounds=3):
    return {
        "case": "sums",
        "rival": rival,
        "ours": ours,
        "seconds": 0.002 * times,
        "spread": 0.1,
        "times_ours": times,
        "rounds": rounds,
        "result": result,
    }


def test_the_verdict_is_of_our_fastest_and_the_fastest_peer():
    rows = [row("blokern", 1.0, ours=True), row("blokern, packed", 0.5), row("a", 0.75), row("b", 3.0)]
    assert page.verdict(rows) == ("first", "blokern, packed is first, 1.50 times faster than a.")
    assert page.verdict([rows[0], *rows[2:]]) == ("behind", "a is first, 1.33 times faster than blokern.")


def test_a_surrogate_and_a_weaker_attack_count_for_no_place():
    rows = [row("blokern", 1.0, result="40.5% hold"), row("a", 0.8, result="40.0% hold")]
    assert page.verdict([*rows, row("blokern, bf16 surrogate", 0.3)])[0] == "behind"
    rows = [row("blokern", 0.5, result="43.0% hold"), row("a", 1.0, result="40.6% hold")]
    assert page.verdict(rows) == ("behind", "a is stronger: 40.6% of the images hold, 43.0% of ours.")


@pytest.mark.parametrize("times", [0.985, 1.0, 1.015])
def test_rivals_within_two_percent_are_level(times):
    assert page.verdict([row("blokern", 1.0), row("a", times)]) == ("level", "blokern and a are level.")


def test_a_page_says_first_where_a_peer_wins(tmp_path):
    assert "Nothing is measured yet." in page.render(tmp_path)
    result = {
        "machine": {"processor": "P", "cores": 2, "threads": 2},
        "versions": {"torch": "2", "peer": "1"},
        "date": "2026-01-02T03:04",
        "commit": "abc",
        "rows": [row("blokern", 1.0, ours=True), row("peer", 0.5, result="error 1e-6")],
        "left_out": {"products": "peer: relative error 0.5 of blokern"},
    }
    (tmp_path / "peers_sparse.json").write_text(json.dumps(result))
    text = page.render(tmp_path)
    assert "blokern is first in 0 of 1, and level with the first in 0." in text
    assert "- sums: peer is first, 2.00 times faster than blokern." in text
    assert "| **blokern** | 2 ms | 1.00 | ±10% |  |\n| peer | 1 ms | 0.50 | ±10% | error 1e-6 |" in text
    assert "### products\n\nNot measured: results were not the same. peer: relative error 0.5" in text
    assert "Versions: torch 2, peer 1." in text


@pytest.mark.parametrize("long", [None, 2])
def test_rivals_are_timed_and_compared(long):
    calls = {"blokern": 0, "peer": 0}

    def summing(name, value):
        def run():
            calls[name] += 1
            return torch.tensor([3.0, value])

        return run

    runs = {"blokern": summing("blokern", 4.0), "peer": summing("peer", 4.0001)}
    rows = hold(Contest("sums", runs, "blokern", close("blokern", 1e-3), rounds=long), rounds=2)
    assert [(r["rival"], r["ours"], r["rounds"]) for r in rows] == [("blokern", True, 2), ("peer", False, 2)]
    assert [r["result"] for r in rows] == ["", "error 2e-05"]
    assert rows[0]["times_ours"] == 1.0
    if long:
        assert calls == {"blokern": 2, "peer": 2}

    runs["peer"] = summing("peer", 4.1)
    with pytest.raises(AssertionError, match=r"peer: relative error 0\.02 of blokern"):
        hold(Contest("sums", runs, "blokern", close("blokern", 1e-3), rounds=long), rounds=1)
