"""CUDA graphs: what may not be done while one is captured."""

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether what is started on the device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
