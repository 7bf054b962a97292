"""K-Means over rows that several processes share; the processes are processes_kmeans.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed


@pytest.mark.skipif(not hasattr(os, "fork") or not distributed.is_available(), reason="needs fork and gloo")
def test_two_processes_find_what_one_finds_in_all_rows(tmp_path):
    script = Path(__file__).parent / "processes_kmeans.py"
    found = subprocess.run([sys.executable, script, tmp_path / "store"], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
