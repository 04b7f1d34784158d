"""The ceiling that steps are compared with reads three streams and writes two."""

import torch
from interpreter import interpreted_fixture  # noqa: F401

from bench import stream


def check_stream():
    from bench import stream_gpu

    torch.manual_seed(0)
    p, g, m = torch.randn(3, stream_gpu.BLOCK + 5)
    want_m = m + g
    want_p = p - want_m
    stream_gpu.stream(p, g, m)
    assert torch.equal(m, want_m) and torch.equal(p, want_p)


def test_the_stream_of_a_gpu_reads_three_and_writes_two(interpreted):
    interpreted(check_stream)


def test_the_stream_of_a_cpu_does_the_same(monkeypatch):
    monkeypatch.setattr(stream, "NUMEL", 1001)
    ceiling = stream.Stream(torch.device("cpu"))
    ceiling.step()
    passes = stream.PASSES if ceiling.how == "C loop" else 1
    m = 1 + torch.arange(1, passes + 1.0)
    assert torch.equal(ceiling.buffers[2], torch.full((1001,), m[-1].item()))
    assert torch.equal(ceiling.buffers[0], torch.full((1001,), 1 - m.sum().item()))
