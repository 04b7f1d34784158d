"""What a CUDA graph keeps of a step by the Triton kernels, without a GPU: a stand-in records it.

The kernels run in Triton's interpreter. While the stand-in captures, launches and uploads are
written down and nothing runs; memory that only an upload would fill holds nonsense until a replay.
"""

import gc
import weakref

import pytest
import torch
from cases import EXTENSION
from interpreter import interpreted_fixture  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from fused_momentum import FusedSGD, FusedSGDSaI
from fused_momentum.walk import Walk

RULES = {
    "sgd": (FusedSGD, {"momentum": 0.9, "weight_decay": 0.05}),
    "sgd_sai": (FusedSGDSaI, {}),
}
extensions = pytest.mark.parametrize("extension", [True, False], ids=["extension", "pure-python"])
SIZES = ((3,), (20, 30), (1030,), ())


class Recorder(TorchDispatchMode):
    """Writes down copies in place of making them."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **kwargs or {})
        self.copies.append(args[:2])
        return args[0].fill_(77)


class Graph:
    """Stands for a CUDA graph of what ``step`` starts."""

    def __init__(self, step):
        from fused_momentum.kernels import launch, table

        self.copies, self.launches, self._launch = [], [], launch.launch
        with pytest.MonkeyPatch.context() as patch, Recorder(self.copies):
            patch.setattr(table, "is_capturing", lambda device: True)
            patch.setattr(launch, "launch", lambda *args, **kw: self.launches.append((args, kw)))
            step()

    def replay(self):
        for to, source in self.copies:
            to.copy_(source)
        for args, options in self.launches:
            self._launch(*args, **options)


def new_grads(params, seed):
    """Gradients in new memory."""
    maker = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=maker).to(p.dtype) for p in params]


class Pair:
    """The same training by Triton, with a learning rate on its device, and by the reference."""

    def __init__(self, name, dtype, lr):
        cls, kwargs = RULES[name]
        self.lr = lr
        tensors = [torch.randn(size).to(dtype) for size in SIZES]
        self.ours, self.truth = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        self.optimizer = cls(self.ours, lr=lr, capturable=True, backend="triton", **kwargs)
        self.reference = cls(self.truth, lr=0.0, backend="reference", **kwargs)

    def set(self, grads):
        for p, grad in zip(self.ours, grads, strict=True):
            p.grad = grad

    def follow(self, grads, step):
        """The reference takes a step with these gradients; ``step`` is ours. The same comes out."""
        for p, grad in zip(self.truth, grads, strict=True):
            p.grad = grad.clone()
        self.reference.param_groups[0]["lr"] = self.lr.item()
        self.reference.step()
        step()
        assert all(torch.equal(p, q) for p, q in zip(self.ours, self.truth, strict=True))

    def eager(self, grads):
        self.set(grads)
        self.follow(grads, self.optimizer.step)

    def started(self):
        """After two steps; the gradients of the last."""
        for seed in range(2):
            grads = new_grads(self.ours, seed)
            self.eager(grads)
        return grads


def check_graph(name, dtype, extension, moves):
    from fused_momentum import native

    with pytest.MonkeyPatch.context() as patch:
        if not extension:
            patch.setattr(native, "load", lambda: (None, "none for this test"))
        torch.manual_seed(0)
        lr = torch.tensor(0.1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        pair = Pair(name, dtype, lr)
        old = pair.started()
        fixed = new_grads(pair.ours, 2) if moves else old
        pair.set(fixed)
        before = [p.detach().clone() for p in pair.ours]
        graph = Graph(pair.optimizer.step)
        assert len(graph.launches) == 1
        assert bool(graph.copies) == moves, "what is there already needs no copy at each replay"
        assert all(map(torch.equal, pair.ours, before)), "the capture itself has changed something"
        for seed, value in enumerate((0.1, 0.05, 0.7), 3):
            # Steps between the replays have tables of their own, at first those before the capture.
            pair.eager(new_grads(pair.ours, 10 * seed) if seed > 3 else old)
            lr.fill_(value)
            torch._foreach_copy_(fixed, new_grads(pair.ours, seed))
            pair.follow(fixed, graph.replay)
        pair.eager(new_grads(pair.ours, 99))


@extensions
@pytest.mark.parametrize("moves", [True, False], ids=["new-grads", "same-grads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_graph_follows_lr_and_keeps_its_tables(name, dtype, extension, moves, interpreted):
    """Captured with gradients that the steps before had, or others; replayed between eager steps.

    The learning rate is read when the kernel runs, bit-equal to one that the host has read.
    """
    interpreted(check_graph, name, dtype, extension, moves)


def check_two_graphs():
    torch.manual_seed(0)
    pair = Pair("sgd", torch.float32, torch.tensor(0.1))
    pair.started()
    graphs = []
    for seed in (2, 3):
        grads = new_grads(pair.ours, seed)
        pair.set(grads)
        graphs.append((Graph(pair.optimizer.step), grads))
    for graph, grads in graphs + graphs[::-1]:
        pair.follow(grads, graph.replay)


def test_two_graphs_do_not_share_their_tables(interpreted):
    interpreted(check_two_graphs)


def check_refusal():
    from fused_momentum.kernels import table

    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    pair = Pair("sgd", torch.float32, torch.tensor(0.1))
    pair.started()
    pair.set(new_grads(pair.ours, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "pinned", refuse)
        with pytest.raises(RuntimeError, match=r"CUDA graph .* two steps .* not permitted"):
            Graph(pair.optimizer.step)
    pair.eager(new_grads(pair.ours, 3))


def test_a_table_that_cannot_be_captured_is_an_error(interpreted):
    interpreted(check_refusal)


@extensions
def test_which_learning_rates_are_read_on_the_device(extension):
    single, double = torch.tensor(0.5), torch.tensor([0.25], dtype=torch.float64)
    rates = [single, double, 0.125, single.half(), single]
    groups = [
        {"params": [torch.zeros(3)], "lr": lr, "capturable": k < 4} for k, lr in enumerate(rates)
    ]
    rule = FusedSGD.rule
    walk = Walk(rule, "cpu")
    if extension:
        keys = [EXTENSION.StateKey("momentum_buffer", 1)]
        walk = EXTENSION.Plan(0, rule.hyper, [[]] * len(rule.hyper), keys, "cpu")
    step = (FusedSGD(groups).param_groups, {}, None, 1.0, [])
    walk.read(*step)
    assert walk.device_lr() is None
    walk.keep_lr_on_device()
    walk.read(*step)
    assert walk.device_lr().tolist() == [single.data_ptr(), double.data_ptr() + 1, 0, 0, 0]
    assert walk.hyper()[:, 0].tolist() == [0.0, 0.0, 0.125, 0.5, 0.5]


def check_kept(moves):
    pair = Pair("sgd", torch.float32, torch.tensor(0.1))
    grads = pair.started()
    pair.set(new_grads(pair.ours, 2) if moves else grads)
    graph = Graph(pair.optimizer.step)
    (((_, _, _, arguments, *_), _),) = graph.launches
    read = [weakref.ref(t) for t in arguments if isinstance(t, torch.Tensor)]
    read += [weakref.ref(source) for _, source in graph.copies]
    del graph, arguments
    for seed in (3, 4):
        pair.eager(new_grads(pair.ours, seed))
    gc.collect()
    assert len(read) > 4
    assert all(ref() is not None for ref in read)


@pytest.mark.parametrize("moves", [True, False], ids=["new-grads", "same-grads"])
def test_what_a_graph_reads_stays(moves, interpreted):
    """Whatever steps come after the capture."""
    interpreted(check_kept, moves)
