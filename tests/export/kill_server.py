"""Merges in processes that are killed: imports all once, forks for each merge, kills the fork after a while.

python kill_server.py ADAPTER OUT SEED KILLS        prints one line a kill: `absent`, or the hash of what lies in OUT
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from lora_ft.export import merge


def run_merge(adapter: Path, out: Path) -> None:
    """The merge, in a fork; its output is of no interest."""
    merge.merge_adapter(adapter, out, prove=False)


def fork_merge(adapter: Path, out: Path) -> int:
    """The fork's process id."""
    child = os.fork()
    if child == 0:
        try:
            run_merge(adapter, out)
        finally:
            os._exit(0)
    return child


def state(out: Path) -> str:
    """What a reader would find."""
    if not out.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(out.iterdir()):
        if path.name not in ("merge_report.json", "README.md"):  # these hold the time the merge took
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """The kills, at moments spread over the time a whole merge takes."""
    adapter, out, draw = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    run_merge(adapter, out)  # in this process, so that forks find all libraries imported
    print(state(out), flush=True)
    shutil.rmtree(out)
    started = time.monotonic()
    os.waitpid(fork_merge(adapter, out), 0)
    duration = time.monotonic() - started
    shutil.rmtree(out)
    for _ in range(int(sys.argv[4])):
        child = fork_merge(adapter, out)
        time.sleep(draw.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(state(out), flush=True)
        if out.exists():
            shutil.rmtree(out)
    os.waitpid(fork_merge(adapter, out), 0)
    print(state(out), flush=True)


if __name__ == "__main__":
    main()
