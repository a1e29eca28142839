import signal

import pytest

from wemoe_fast.benchmarks import faults_merge
from wemoe_fast.benchmarks.faults_merge import Scenario, kill_at_random, merge

pytest.importorskip("transformers")


@pytest.mark.parametrize(("sig", "kills"), [(signal.SIGKILL, 3), (signal.SIGINT, 1)])
def test_a_merge_killed_at_any_moment_leaves_the_old_or_the_new_model(tmp_path, sig, kills):
    outcome = kill_at_random(merge(tmp_path), kills, seed=1, sig=sig)
    assert not outcome.problems
    assert sum(outcome.states.values()) == kills


def test_a_writer_that_is_not_atomic_is_found_out(tmp_path):
    out = tmp_path / "folder" / "out"

    def run():
        out.mkdir(parents=True, exist_ok=True)
        for name in "abcdefgh":
            (out / name).write_bytes(b"x")
            faults_merge.time.sleep(0.03)

    scenario = Scenario(run, out, lambda: faults_merge.shutil.rmtree(out, ignore_errors=True), lambda: None)
    outcome = kill_at_random(scenario, 3)
    assert outcome.states["killed, broken"] > 0
    assert "neither" in outcome.problems[0]
