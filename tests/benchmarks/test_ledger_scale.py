"""The ledger's benchmark runs, counts what it should, and ends in one line of JSON."""

import json

import pytest

from benchmarks import ledger_scale


def test_a_small_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_scale, "apart", lambda function, *arguments: function(*arguments))
    ledger_scale.main(["--rows", "6400", "--shards", "20", "--replicas", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "ledger_scale" and (result["rows"], result["replicas"]) == (6400, 2)
    assert 10 <= result["parts_at_once_max"] < 200  # of the shards being read, not of all
    assert result["resume_parts"] == 8 * 5
    figures = ("look_seconds_max", "driver_peak_mib", "lists_per_hour", "resume_seconds")
    assert all(result[figure] > 0 for figure in figures)
