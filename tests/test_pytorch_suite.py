"""PyTorch's generic optimizer checks, driven by the tables it ships for torch.optim.SGD.

torch.testing._internal.common_optimizers lists constructor arguments, schedulers and error
inputs; the checks that loop over them are not in the wheel and are written here anew. Left out:
sparse convergence (sparse gradients are an error here) and tensors of more than 2**31 elements.
"""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_suite import INFO, Problem, grid, make, same, subjects

from fused_momentum import FusedSGD

# --- errors ----------------------------------------------------------------------------------

ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
MORE_ERRORS = {  # arguments -> type and text of torch's own error
    "lr": ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, r"Invalid weight_decay value: -1\.0"),
    "nesterov": ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum and zero"),
    "nesterov_dampening": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
    ),
    "fused_foreach": (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
    ),
    "fused_differentiable": (
        {"fused": True, "differentiable": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
}


@subjects
@pytest.mark.parametrize("row", ERRORS, ids=lambda r: r.optimizer_error_input.desc)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_torch_error_inputs(cls, row):
    # torch only warns of a duplicate and updates the parameter twice; here it is an error.
    warned = issubclass(row.error_type, Warning)
    error, text = (ValueError, "duplicate") if warned else (row.error_type, row.error_regex)
    bad = row.optimizer_error_input
    with pytest.raises(error, match=text):
        cls(bad.params, **bad.kwargs)


@subjects
@pytest.mark.parametrize(("kwargs", "error", "text"), MORE_ERRORS.values(), ids=MORE_ERRORS)
def test_more_constructor_errors(cls, kwargs, error, text):
    if cls is not FusedSGD and "nesterov" in kwargs:
        text = "no nesterov switch"
    with pytest.raises(error, match=text):
        cls([Parameter(torch.ones(2))], **kwargs)


@subjects
@pytest.mark.parametrize("fused", [None, True])
def test_meta_parameters_raise_at_the_first_step_and_work_once_real(cls, fused):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
        opt = cls(model.parameters(), lr=0.5, momentum=0.9, fused=fused)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="meta"):
        opt.step()
    opt.zero_grad()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # keep the Parameter objects
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
        p.grad = torch.ones_like(p)
    opt.step()
    assert all((p < 0).all() for p in model.parameters())


def _sparse_gradient(p):
    p.grad = torch.ones(4).to_sparse()


def _gradient_of_another_shape(p):
    p.grad = torch.ones(4)
    p.data = torch.ones(5)


def _complex_gradient(p):
    p.data = torch.ones(4, dtype=torch.complex64)
    p.grad = torch.ones(4, dtype=torch.complex64)
    p.data = torch.ones(4)


BROKEN = {
    "sparse": _sparse_gradient,
    "shape": _gradient_of_another_shape,
    "dtype": _complex_gradient,
}


@subjects
@pytest.mark.parametrize(("word", "spoil"), BROKEN.items(), ids=BROKEN)
def test_a_bad_gradient_names_its_tensor_and_changes_nothing(cls, word, spoil):
    good, bad = params = [Parameter(torch.ones(4)) for _ in range(2)]
    opt = cls(params, lr=0.5, momentum=0.5)
    good.grad, bad.grad = torch.ones(4), torch.ones(4)
    opt.step()
    good.grad, bad.grad = torch.ones(4), None
    spoil(bad)
    before = copy.deepcopy((params, opt.state_dict()["state"]))
    with pytest.raises(
        (TypeError, ValueError, RuntimeError), match=rf"(?s)(?=.*{word})(?=.*\b1\b)"
    ):
        opt.step()
    torch.testing.assert_close((params, opt.state_dict()["state"]), before, rtol=0, atol=0)


@subjects
def test_integer_parameters_raise(cls):
    whole = Parameter(torch.ones(4, dtype=torch.int64), requires_grad=False)
    whole.grad = torch.ones(4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=r"(?s)(?=.*int64)(?=.*\b1\b)"):
        cls([Parameter(torch.ones(4)), whole]).step()


# --- direction -------------------------------------------------------------------------------


def _assert_right_direction(problem, opt, schedulers, maximize, steps=20):
    before = problem.loss().item()
    for _ in range(steps):
        loss = opt.step(problem.closure)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(loss.item()) if plateau else scheduler.step()
    after = problem.loss().item()
    assert after > before if maximize else after < before


@grid
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("flag", [None, "foreach", "fused"])
def test_goes_the_right_direction(cls, kwargs, strided, flag):
    problem = Problem(strided)
    opt = make(cls, kwargs, problem, **({flag: True} if flag else {}))
    _assert_right_direction(problem, opt, [], kwargs.get("maximize"))


@grid
@pytest.mark.parametrize("schedule", range(len(INFO.scheduler_inputs)))
def test_goes_the_right_direction_with_schedulers(cls, kwargs, schedule):
    problem = Problem(strided=schedule % 2 == 1)
    opt = make(cls, kwargs, problem)
    schedulers = [make(opt) for make in INFO.scheduler_inputs[schedule]]
    _assert_right_direction(problem, opt, schedulers, kwargs.get("maximize"))


@grid
@pytest.mark.parametrize("schedule", range(len(INFO.scheduler_inputs)))
def test_goes_the_right_direction_with_group_lr_and_schedulers(cls, kwargs, schedule):
    problem = Problem()
    weight, bias = problem.params
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
    opt = cls(groups, **copy.deepcopy(kwargs))
    schedulers = [make(opt) for make in INFO.scheduler_inputs[schedule]]
    _assert_right_direction(problem, opt, schedulers, kwargs.get("maximize"))


# --- groups, lr, complex ---------------------------------------------------------------------


@subjects
@pytest.mark.parametrize(("key", "value"), [("lr", 0.25), ("weight_decay", 0.5), ("momentum", 0.5)])
def test_a_group_has_its_own_hyperparameter(cls, key, value):
    start, common = torch.randn(6), {"lr": 0.125, "weight_decay": 0.0, "momentum": 0.75}
    grouped = [Parameter(start.clone()) for _ in range(2)]
    alone = [Parameter(start.clone()) for _ in range(2)]
    opts = [cls([{"params": grouped[:1], key: value}, {"params": grouped[1:]}], **common)]
    opts += [cls(alone[:1], **common | {key: value}), cls(alone[1:], **common)]
    for step in range(3):
        for p in grouped + alone:
            p.grad = torch.full_like(p, 1.0 + step)
        for opt in opts:
            opt.step()
    assert torch.equal(grouped[0], alone[0])
    assert torch.equal(grouped[1], alone[1])
    assert not torch.equal(grouped[0], grouped[1])


@grid
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_lr_equals_float_lr(cls, kwargs, shape, dtype):
    lr = torch.full(shape, 2.0**-7, dtype=dtype)  # exact in both, so the results are equal
    kwargs = {k: v for k, v in kwargs.items() if k != "lr"}
    torch.manual_seed(1)
    first = Problem()
    second = copy.deepcopy(first)
    first.train(make(cls, kwargs, first, lr=lr))
    second.train(make(cls, kwargs, second, lr=2.0**-7))
    assert same(first, second)
    assert torch.equal(lr, torch.full(shape, 2.0**-7, dtype=dtype))


@grid
@pytest.mark.parametrize("shape", [(7,), (3, 4)], ids=["1d", "2d"])
def test_complex_parameter_equals_its_real_view(cls, kwargs, shape):
    z = Parameter(torch.randn(shape, dtype=torch.complex64))
    x = Parameter(torch.view_as_real(z.detach()).clone())
    opts = cls([z], **copy.deepcopy(kwargs)), cls([x], **copy.deepcopy(kwargs))
    for _ in range(3):
        z.grad = torch.randn_like(z)
        x.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
    assert torch.equal(torch.view_as_real(z.detach()), x)
    for name, buffer in opts[0].state.get(z, {}).items():
        real = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        assert torch.equal(real, opts[1].state[x][name])


# --- steps that do nothing -------------------------------------------------------------------


@grid
def test_no_gradient_is_a_no_op(cls, kwargs):
    p = Parameter(torch.randn(4))
    before = p.detach().clone()
    opt = cls([p], **copy.deepcopy(kwargs))
    opt.step()
    assert torch.equal(p, before)
    assert not opt.state.get(p)


@grid
def test_zero_gradient_is_a_no_op_without_decay(cls, kwargs):
    p = Parameter(torch.randn(4))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    opt = cls([p], **copy.deepcopy(kwargs))
    opt.step()
    assert torch.equal(p, before) == (not opt.param_groups[0]["weight_decay"])
