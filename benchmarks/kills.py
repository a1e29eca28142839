"""Work in a forked process, which may be killed at some moment."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable


def child(run: Callable[[], object], moment: float | None = None, sig: int = signal.SIGKILL) -> int:
    """The exit status of a process that does `run` and gets a signal after `moment` seconds: 0 where `run` ended well,
    1 where it raised, negative where a signal ended it."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            if moment is None:
                traceback.print_exc()
        finally:
            os._exit(status)
    if moment is not None:
        time.sleep(moment)
        os.kill(process, sig)  # one that ended by itself stays until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
