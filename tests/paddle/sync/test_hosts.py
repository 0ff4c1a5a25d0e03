"""Ranks on two "hosts": network namespaces that a cable joins, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import Place, run_world
from sync_cases import CASES, STEPS

CASE = "fused"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


@pytest.fixture
def hosts() -> Iterator[list[Place]]:
    """Two network namespaces with a veth pair between them."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip, which makes network namespaces, is not installed")
    names = [f"flatwater-{os.getpid()}-{end}" for end in "ab"]
    ends = [f"fw{os.getpid() % 10**6}{end}" for end in "ab"]
    addresses = ["10.201.77.1", "10.201.77.2"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(names, ends, addresses, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        yield [
            # Gloo would take the address that the host's name stands for.
            Place(address, ("ip", "netns", "exec", name), (("GLOO_SOCKET_IFNAME", end),))
            for name, end, address in zip(names, ends, addresses, strict=True)
        ]
    finally:
        for name in names:  # and the cable with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_compute_what_one_process_computes(hosts: list[Place], tmp_path: Path) -> None:
    places = [hosts[0], hosts[0], hosts[1], hosts[1]]
    ended = run_world(4, "hosts_worker.py", tmp_path, CASE, places=places)
    assert [one.status for one in ended] == [0] * 4, "\n".join(one.output for one in ended)
    found = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(4)]
    interfaces = [str(rank["interfaces"]) for rank in found]
    assert interfaces[0] == interfaces[1] != interfaces[2] == interfaces[3]
    expected = CASES[CASE].expected(4)
    for step in range(STEPS):
        for key, whole in expected[step].items():
            parts = [rank[f"{step} {key}"] for rank in found]
            if key in ("mean", "variance"):
                together = parts[0]
            else:
                together = sum(parts) if key in ("dweight", "dbias") else np.concatenate(parts)
            # 1e-6 is 16 roundings to float32, as in test_sync.py.
            assert np.abs(together - whole).max() <= 1e-6 * np.abs(whole).max(), f"step {step}, {key}"
