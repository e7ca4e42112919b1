"""Lets vLLM's V2 model runner run on a CPU: on PYTHONPATH, every Python process begins with this file.

That runner needs Triton, which vLLM believes to be there if Triton has a backend for the CPU. Triton's wheels have
none, but its interpreter runs kernels on the CPU, slowly and without a backend. So one is entered that is never asked.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import Backend, backends
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


backends["cpu"] = Backend(None, Driver)  # type: ignore[arg-type]
