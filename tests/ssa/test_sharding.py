"""Ensembles that several processes share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed


@pytest.mark.skipif(not hasattr(os, "fork") or not distributed.is_available(), reason="needs fork and gloo")
def test_one_two_and_three_processes_have_the_bits_of_one(tmp_path):
    """Uneven shares, more processes than trajectories, a process that fails: see sharded.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
