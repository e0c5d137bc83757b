"""Memory a worker of a merge uses again for every piece; with new pages for each, the kernel took twice its time."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Scratch(threading.local):
    """One buffer a role and thread, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}
        """Role → bytes."""

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, which lasts until this thread asks for that role again."""
        import torch

        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self.buffers.get(role)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self.buffers[role] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes].view(dtype).view(shape)

    def release(self) -> None:
        """This thread's buffers given back, after a tensor that was in memory in one piece."""
        self.buffers.clear()


SCRATCH = Scratch()
