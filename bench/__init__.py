"""Benchmarks of fused_momentum against torch.optim.SGD; the package never imports this."""
