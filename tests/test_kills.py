import os
import signal
import time

import pytest

from wemoe_fast.benchmarks.kills import child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def test_the_status_says_how_it_ended(capfd):
    assert child(lambda: None) == 0
    assert child(lambda: 1 / 0) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert child(lambda: time.sleep(60), 0.01) == -signal.SIGKILL
    assert child(lambda: time.sleep(60), 0.2, signal.SIGTERM) == -signal.SIGTERM
