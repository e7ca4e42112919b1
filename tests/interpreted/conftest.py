"""Tests of the Triton kernels under Triton's interpreter: in a process of its own, started by tests/test_triton.py."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
