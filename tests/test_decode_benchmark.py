import json
import sys

import pytest

from wemoe_fast import WEMoEError

pytest.importorskip("transformers")

from benchmarks import decode


def test_every_contender_is_timed_and_written(tmp_path, monkeypatch, capsys):
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    monkeypatch.setattr(decode, "MODEL", decode.MODEL | small)
    monkeypatch.setattr(decode, "check", lambda experts: None)
    out = tmp_path / "decode.json"
    arguments = ["--sequences", "1", "3", "--experts", "2", "--prompt", "4", "--new", "2", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["decode", *arguments, "--out", str(out)])
    assert decode.main() == 0
    results = json.loads(out.read_text())["results"]
    assert [entry["sequences"] for entry in results] == [1, 3]
    assert all(len(times) == 2 and min(times) > 0 for entry in results for times in entry["seconds"].values())
    assert all(set(entry["tokens_per_second"]) == {decode.STATIC, *decode.CONTENDERS} for entry in results)
    assert capsys.readouterr().out.count("wemoe-fast, step") == 1


def test_other_tokens_than_the_loop_s_end_it(monkeypatch):
    decode.check(2, new=3)
    run, calls = decode.generate, []

    def wrong(*args):
        calls.append(0)
        return run(*args) + (len(calls) == 1)

    monkeypatch.setattr(decode, "generate", wrong)
    with pytest.raises(WEMoEError, match=r"wemoe-fast, prompt \(auto\): expected the tokens of the loop"):
        decode.check(2, new=3)
