from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_three_kills_resume_to_the_same_bytes() -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.faults_evaluate", "--kills", "3", "--samples", "200", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 kills, 3 resumed to the same bytes")
