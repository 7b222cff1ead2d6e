"""A rank that trains nothing: `rank.py FOLDER` tells FOLDER how it fares and does as the files there say.

pid-N         written at its start: its process id, and what it sees of the environment
saved-N       written on SIGTERM, before it ends well
fail-N        raises an error;  end  ends well
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

folder, rank = Path(sys.argv[1]), os.environ["RANK"]


def save(*_: Any) -> None:
    (folder / f"saved-{rank}").touch()
    sys.exit(0)


signal.signal(signal.SIGTERM, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
(folder / f"pid-{rank}.partial").write_text(json.dumps({"pid": os.getpid(), **os.environ}))
(folder / f"pid-{rank}.partial").rename(folder / f"pid-{rank}")
print(f"rank {rank} is up", flush=True)
while not (folder / "end").exists():
    if (folder / f"fail-{rank}").exists():
        raise RuntimeError(f"the moon is down on {rank}")
    if rank == "0" and (folder / "fail-3").exists():  # as a peer's end shows in a collective, here even earlier
        time.sleep(0.2)
        raise ConnectionError("connection closed by peer")
    time.sleep(0.05)
