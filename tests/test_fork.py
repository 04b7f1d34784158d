"""A process that is forked while another thread takes a step."""

import os
import threading

import pytest
import torch
from torch.nn import Parameter

from fused_momentum import FusedSGD


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_may_step():
    optimizer = FusedSGD([Parameter(torch.ones(3))], lr=0.1, backend="reference")
    inside, done = threading.Event(), threading.Event()

    def hold():
        with optimizer._lock:
            inside.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        free = optimizer._lock.acquire(timeout=5)
        os._exit(0 if free else 1)
    done.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0
