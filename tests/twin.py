"""Training runs on given gradients, and the bound by which ours may differ from torch.optim.SGD.

Torch runs in the tested dtype and in float64, which is the truth. Ours may err at most twice as
much as torch, plus a floor for tensors too small to show torch's error.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import Parameter

STEPS = 6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _transposed(t):
    return t.mT.contiguous().mT if t.ndim >= 2 else t.clone()


def _channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.clone()


LAYOUTS = {
    "contiguous": torch.clone,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "every_second": lambda t: torch.stack([t, t], -1)[..., 0],
    "odd_offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
}


@dataclass(frozen=True)
class Spec:
    """One parameter; `absent` lists the steps without gradient, `joins` the step it is added at."""

    shape: tuple = ()
    dtype: torch.dtype | None = None  # None: that of the run
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    absent: tuple = ()
    joins: int = 0


@dataclass(frozen=True)
class Case:
    """Arguments, parameters, overrides of group i % len, and group keys written before a step."""

    kwargs: dict = field(default_factory=dict)
    specs: tuple = tuple(Spec(shape) for shape in [(7, 5), (130,), (2, 3, 4, 5), (1,), ()])
    groups: tuple = ({},)
    writes: dict = field(default_factory=dict)


def _with(index, **changes):
    specs = list(Case.specs)
    specs[index] = Spec(specs[index].shape, **changes)
    return tuple(specs)


HEAVY = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}
NESTEROV = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
CASES = {
    "plain": Case(),
    "decay": Case({"lr": 0.1, "weight_decay": 0.05}),
    "momentum": Case({"lr": 0.1, "momentum": 0.9}),
    "dampening": Case(HEAVY),
    "nesterov": Case(NESTEROV),
    "maximize": Case(HEAVY | {"maximize": True}),
    "maximize_nesterov": Case(NESTEROV | {"maximize": True}),
    "tensor_lr": Case(HEAVY | {"lr": torch.tensor(0.1)}),
    "no_grad_at_step_2": Case(HEAVY, _with(1, absent=(2,))),
    "late_first_grad": Case(HEAVY, _with(0, absent=(0, 1, 2))),
    "frozen_then_thawed": Case(NESTEROV, _with(2, absent=(3, 4))),
    "never_a_grad": Case(HEAVY, _with(1, absent=tuple(range(STEPS)))),
    "joins_at_step_3": Case(HEAVY, _with(4, joins=3)),
    "groups": Case(HEAVY, groups=({}, {"lr": 0.01, "momentum": 0}, {"weight_decay": 0})),
    "nesterov_group": Case(HEAVY, groups=({}, {"nesterov": True, "dampening": 0})),
    "written": Case(HEAVY, writes={2: {"lr": 0.02}, 4: {"momentum": 0.5, "weight_decay": 0}}),
    "strided": Case(HEAVY, _with(2, layout="channels_last", grad_layout="every_second")),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Run:
    """Parameters, an optimizer over them, and the largest magnitude met."""

    def __init__(self, cls, case, dtype, truth=False, **more):
        self.case, self.dtype, self.truth, self.largest = case, dtype, truth, 0.0
        self.params = [self._param(i) for i in range(len(case.specs))]
        groups = [
            {"params": [p for i, p in self._present(0) if i % len(case.groups) == g], **override}
            for g, override in enumerate(case.groups)
        ]
        self.opt = cls([g for g in groups if g["params"]], **case.kwargs, **more)

    def _values(self, i, key):
        spec = self.case.specs[i]
        maker = torch.Generator().manual_seed(1000 * key + i)
        return torch.randn(spec.shape, generator=maker).to(spec.dtype or self.dtype)

    def _placed(self, i, key, layout):
        values = self._values(i, key)
        return LAYOUTS[layout](values.double() if self.truth else values)

    def _param(self, i):
        return Parameter(self._placed(i, 999, self.case.specs[i].layout))

    def _present(self, step):
        return [(i, p) for i, p in enumerate(self.params) if self.case.specs[i].joins <= step]

    def train(self, first=0, last=STEPS):
        for step in range(first, last):
            for group in self.opt.param_groups:
                group.update(self.case.writes.get(step, {}))
            for i, p in self._present(step):
                spec = self.case.specs[i]
                if spec.joins == step > 0:
                    self.opt.add_param_group({"params": [p]})
                p.requires_grad_(step not in spec.absent)
                p.grad = self._placed(i, step, spec.grad_layout) if p.requires_grad else None
            self.opt.step()
            for i, p in self._present(step):  # the optimizer only reads gradients
                spec = self.case.specs[i]
                kept = None if step in spec.absent else self._placed(i, step, spec.grad_layout)
                assert p.grad is kept or torch.equal(p.grad, kept)
            met = self.params + self.buffers() + [p.grad for p in self.params]
            self.largest = max(
                [self.largest, *(t.abs().max().item() for t in met if t is not None and t.numel())]
            )
        return self

    def slots(self):
        """The state of each parameter, None where there is none yet."""
        states = [self.opt.state.get(p, {}) for p in self.params]
        return [s.get("momentum_buffer", s.get("velocity")) for s in states]

    def buffers(self):
        return [b for b in self.slots() if b is not None]


def torch_sgd(*args, **kwargs):
    return torch.optim.SGD(*args, **kwargs, foreach=False)


def assert_equal(first, second):
    """The same bits in every parameter and buffer."""
    for a, b in [(first.params, second.params), (first.buffers(), second.buffers())]:
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), f"tensor {i} differs"


def assert_as_close_as_torch(ours, case, dtype):
    """Every parameter and buffer of `ours` within twice torch's own error against float64."""
    torchs = Run(torch_sgd, case, dtype).train()
    truth = Run(torch_sgd, case, dtype, truth=True).train()
    floors = [param_floor(p.dtype, truth.largest) for p in ours.params]
    compare(ours.params, torchs.params, truth.params, floors)
    floors = [
        buffer_floor(b.dtype, p.dtype, truth.largest)
        for p, b in zip(ours.params, ours.slots(), strict=True)
        if b is not None
    ]
    compare(ours.buffers(), torchs.buffers(), truth.buffers(), floors)


def compare(ours, torchs, truth, floors):
    """Error at most twice torch's, plus a floor; tensors of one floor share their worst elements.

    The floor is what rounding alone can do where torch was lucky, as on a tensor of one element.
    """
    for floor in set(floors):
        pool = [
            tensors
            for tensors, own in zip(zip(ours, torchs, truth, strict=True), floors, strict=True)
            if own == floor
        ]
        error = max(_distance(mine, exact) for mine, _, exact in pool)
        bound = 2 * max(_distance(theirs, exact) for _, theirs, exact in pool) + floor
        assert error <= bound, f"error {error:.3e} > {bound:.3e} allowed"


def param_floor(dtype, largest):
    """Rounding in STEPS steps, where no value exceeds `largest`; the truth's own included.

    A step stores p: one rounding in its dtype. Before that it casts wd, mu, 1-d and lr, and rounds
    wd*p, g+, mu*m, (1-d)*g, +, mu*m, +, lr*d: 12 in the arithmetic's dtype, times lr <= 0.1.
    """
    return sum(
        STEPS * largest * (_half_ulp(d) + 1.2 * _half_ulp(_arithmetic(d)))
        for d in (dtype, torch.float64)
    )


def buffer_floor(dtype, param_dtype, largest):
    """As above: 3 casts and 5 roundings a step, and wd <= 0.05 of the parameter's error."""
    own = sum(STEPS * largest * 8 * _half_ulp(d) for d in (dtype, torch.float64))
    return own + 0.05 * STEPS * param_floor(param_dtype, largest)


def _arithmetic(dtype):
    return torch.promote_types(dtype, torch.float32)


def _half_ulp(dtype):
    return torch.finfo(dtype).eps / 2


def _distance(a, b):
    assert a.shape == b.shape
    return (a.detach().double() - b.detach().double()).abs().max().item() if a.numel() else 0.0
