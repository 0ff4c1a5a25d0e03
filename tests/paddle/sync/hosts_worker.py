"""What each rank does in test_hosts.py: two training steps of one layer; results into a folder."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
from paddle import distributed
from sync_cases import CASES
from train_worker import run_case

if __name__ == "__main__":
    distributed.init_parallel_env()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found = run_case(CASES[sys.argv[2]], rank, world)
    names = " ".join(name for _, name in socket.if_nameindex())
    np.savez(Path(sys.argv[1]) / f"{rank}.npz", **found, interfaces=np.array(names))
