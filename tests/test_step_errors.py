"""A step, a subset or a checkpoint that cannot be raises and changes nothing at all."""

import copy

import pytest
import torch
from cases import (
    CLASSES,
    accepted,
    backends,
    device_of,
    nested_parameter,
    one_thread,  # noqa: F401  a fixture for every test here
)
from torch.nn import Parameter

from fused_momentum import FusedNAG, FusedSGD

OURS = pytest.mark.parametrize("cls", CLASSES.values(), ids=lambda cls: cls.__name__)
steps_before = pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "later"])


@pytest.fixture(autouse=True)
def on_its_device(request):
    """Tensors are made on the kind of device that the back-end is tested on."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"
    with torch.device(device_of(backend)):
        yield


# --- what a step finds -----------------------------------------------------------------------
# Two groups; the bad tensor is the second of the second group, after good ones.

BAD = r"param_groups\[1\]\['params'\]\[1\]"


class Trainer:
    """Parameters with gradients, and their optimizer."""

    def __init__(self, cls, backend, steps):
        params = [Parameter(torch.ones(size)) for size in ((5,), (2, 3), (4,), (4,))]
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        more = accepted(cls, momentum=0.9, weight_decay=0.1)
        self.opt = cls(groups, lr=0.1, backend=backend, **more)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(steps):
            self.opt.step()
        if steps:
            assert len(self.opt.state) == 4

    @property
    def bad(self):
        return self.opt.param_groups[1]["params"][1]

    def replace(self, param):
        self.opt.param_groups[1]["params"][1] = param
        param.grad = torch.ones_like(param)

    def assert_stops(self, call, kind, message):
        """The call raises; no parameter, state, group or version has changed then."""
        tensors = [p for group in self.opt.param_groups for p in group["params"]]
        tensors += [t for state in self.opt.state.values() for t in state.values()]
        tensors = [t for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta]
        copies = [(t.detach().clone(), t._version) for t in tensors]
        keys = {p: dict(state) for p, state in self.opt.state.items()}
        groups = [dict(group) for group in self.opt.param_groups]
        with pytest.raises(kind, match=message):
            call()
        for t, (then, version) in zip(tensors, copies, strict=True):
            assert torch.equal(t, then)
            assert t._version == version
        assert self.opt.state.keys() == keys.keys()
        for p, state in self.opt.state.items():
            assert state.keys() == keys[p].keys()
            assert all(state[key] is keys[p][key] for key in state)
        assert [dict(group) for group in self.opt.param_groups] == groups


def _grad_free(trainer, grad):
    trainer.bad.grad_dtype = None
    trainer.bad.grad = grad


def _state(trainer, tensor):
    for key in trainer.opt.rule.states:
        trainer.opt.state[trainer.bad][key.name] = tensor


def _grad_of_a_new_shape(trainer):
    trainer.bad.data = torch.ones(5)  # its gradient keeps the old one


def _hyper(**values):
    return lambda trainer: trainer.opt.param_groups[1].update(values)


STEP_ERRORS = {
    "sparse_grad": (
        lambda t: _grad_free(t, torch.ones(4).to_sparse()),
        RuntimeError,
        rf"{BAD}\.grad is sparse.*\(make it dense",
    ),
    "integer_param": (
        lambda t: t.replace(Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)),
        TypeError,
        rf"{BAD} has dtype torch\.int32; needed: torch\.float32",
    ),
    "bool_param": (
        lambda t: t.replace(Parameter(torch.ones(4, dtype=torch.bool), requires_grad=False)),
        TypeError,
        rf"{BAD} has dtype torch\.bool; needed: torch\.float32",
    ),
    "integer_grad": (
        lambda t: _grad_free(t, torch.ones(4, dtype=torch.int64)),
        TypeError,
        rf"{BAD}\.grad has dtype torch\.int64; needed: torch\.float32",
    ),
    "complex_grad": (
        lambda t: _grad_free(t, torch.ones(4, dtype=torch.complex64)),
        TypeError,
        rf"{BAD}\.grad has dtype torch\.complex64, its parameter torch\.float32",
    ),
    "grad_shape": (
        _grad_of_a_new_shape,
        ValueError,
        rf"{BAD}\.grad has shape \[4\], its parameter \[5\]",
    ),
    "grad_shape_in_place": (
        lambda t: t.bad.grad.resize_(3),
        ValueError,
        rf"{BAD}\.grad has shape \[3\], its parameter \[4\]",
    ),
    "meta_param": (
        lambda t: t.replace(Parameter(torch.ones(4, device="meta"))),
        (RuntimeError, ValueError),
        rf"{BAD} is on (device )?meta",
    ),
    "expanded_param": (
        lambda t: t.replace(Parameter(torch.ones(1).expand(4))),
        RuntimeError,
        rf"{BAD} has elements that share memory",
    ),
    "conjugated_param": (
        lambda t: t.replace(Parameter(torch.ones(4, dtype=torch.complex64).conj())),
        TypeError,
        rf"{BAD} is a lazily conjugated or negated view",
    ),
    "state_shape": (
        lambda t: _state(t, torch.ones(5)),
        ValueError,
        rf"{BAD} state has shape \[5\], its parameter \[4\]",
    ),
    "missing_key": (
        lambda t: t.opt.param_groups[1].pop("maximize"),
        KeyError,
        "param_groups: key 'maximize' is missing",
    ),
    "state_dtype": (
        lambda t: _state(t, torch.ones(4, dtype=torch.int32)),
        TypeError,
        rf"{BAD} state has dtype torch\.int32; needed: torch\.float32",
    ),
    "state_device": (
        lambda t: _state(t, torch.ones(4, device="meta")),
        ValueError,
        rf"{BAD} state is on device meta, its parameter on (cpu|cuda:0)",
    ),
    "text_for_lr": (_hyper(lr="0.1"), TypeError, "lr is a str; needed: a number"),
    "two_numbers_for_lr": (
        _hyper(lr=torch.ones(2)),
        TypeError,
        "lr is a Tensor; needed: a number or a",
    ),
    "none_for_momentum": (
        _hyper(momentum=None, beta_cfg=None),
        TypeError,
        "(momentum is a NoneType|beta_cfg is None); needed",
    ),
    "not_a_tensor": (
        lambda t: t.opt.param_groups[1]["params"].__setitem__(1, 1.0),
        TypeError,
        rf"{BAD} is a float; needed: a tensor",
    ),
}


@OURS
@backends
@steps_before
@pytest.mark.parametrize(("spoil", "kind", "message"), STEP_ERRORS.values(), ids=STEP_ERRORS)
@pytest.mark.parametrize("subset", [False, True], ids=["step", "step_params"])
def test_one_bad_tensor_stops_the_whole_step(cls, backend, steps, spoil, kind, message, subset):
    trainer = Trainer(cls, backend, steps)
    spoil(trainer)
    params = trainer.opt.param_groups[0]["params"] + trainer.opt.param_groups[1]["params"]
    step = (lambda: trainer.opt.step_params(params)) if subset else trainer.opt.step
    trainer.assert_stops(step, kind, message)


@OURS
@backends
@steps_before
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_parameter(cls, backend, steps, layout):
    """Torch cannot compare it as the table above does; one of the first step may become nested."""
    good, bad = Parameter(torch.ones(2)), Parameter(torch.ones(5))
    optimizer = cls([good, bad], lr=0.1, backend=backend)
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    before = good.detach().clone()
    torch.utils.swap_tensors(bad, nested_parameter(layout))
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[1\] is a nested tensor"):
        optimizer.step()
    assert torch.equal(good, before)


NOT_STRIDED = {
    "csr": (lambda t: t.to_sparse_csr(), RuntimeError, "is sparse"),
    "csc": (lambda t: t.to_sparse_csc(), RuntimeError, "is sparse"),
    "bsr": (lambda t: t.to_sparse_bsr((2, 2)), RuntimeError, "is sparse"),
    "bsc": (lambda t: t.to_sparse_bsc((2, 2)), RuntimeError, "is sparse"),
    "mkldnn": (lambda t: t.to_mkldnn(), TypeError, "has layout .*needed: torch.strided"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", NOT_STRIDED)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_parameter_that_is_not_strided(layout, backend):
    make, error, message = NOT_STRIDED[layout]
    p = Parameter(make(torch.ones(4, 4)))
    p.grad = make(torch.ones(4, 4))
    with pytest.raises(error, match=rf"\['params'\]\[0\] {message}"):
        FusedSGD([p], lr=0.1, backend=backend).step()


@OURS
@backends
@pytest.mark.parametrize("swap", [False, True], ids=["new_parameters", "swapped_in_place"])
def test_a_meta_model_is_usable_after_to_empty(cls, backend, swap):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    meta = list(model.parameters())
    optimizer = cls(meta, lr=0.5, backend=backend, **accepted(cls, momentum=0))
    for p in meta:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] is on .*meta.*to_empty"):
        optimizer.step()
    assert not optimizer.state
    torch.__future__.set_swap_module_params_on_conversion(swap)
    model.to_empty(device=device_of(backend))
    torch.__future__.set_swap_module_params_on_conversion(False)
    assert swap == all(p is q for p, q in zip(meta, model.parameters(), strict=True))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1.0).all() for p in model.parameters())


# --- step_params -----------------------------------------------------------------------------

STRANGER = Parameter(torch.ones(2))
SUBSETS = {
    "stranger": (lambda own: [own[0], STRANGER], r"params\[1\] is not a parameter of this opt"),
    "equal_stranger": (lambda own: [own[0].clone()], r"params\[0\] is not a parameter of this opt"),
    "twice": (lambda own: [own[0], own[1], own[0]], r"params\[2\] is given twice"),
}


@OURS
@backends
@steps_before
@pytest.mark.parametrize(("subset", "message"), SUBSETS.values(), ids=SUBSETS)
def test_step_params_of_something_else(cls, backend, steps, subset, message):
    trainer = Trainer(cls, backend, steps)
    own = [p for group in trainer.opt.param_groups for p in group["params"]]
    trainer.assert_stops(lambda: trainer.opt.step_params(subset(own)), ValueError, message)


# --- state_dict ------------------------------------------------------------------------------


def _drop_group(saved):
    saved["param_groups"].pop()


def _drop_parameter(saved):
    saved["param_groups"][1]["params"].pop()


def _other_state(saved):
    saved["state"] = {2: {"exp_avg": torch.ones(4)}}


def _other_shape(saved):
    saved["state"][2] = {key: torch.ones(5) for key in saved["state"][2]}


def _one_without_memory(saved):
    last = max(saved["state"])  # all before it could be copied
    saved["state"][last] = {key: t.to("meta") for key, t in saved["state"][last].items()}
    saved["param_groups"][0]["lr"] = 77.0


def _sparse(saved):
    last = max(saved["state"])
    saved["state"][last] = {key: t.to_sparse() for key, t in saved["state"][last].items()}


def _not_a_tensor(saved):
    saved["state"][2] = dict.fromkeys(saved["state"][2], 1.0)


def _no_state(saved):
    del saved["state"]


DICTS = {
    "groups": (_drop_group, ValueError, "different number of parameter groups"),
    "parameters": (_drop_parameter, ValueError, "doesn't match the size of optimizer's group"),
    "other_state": (_other_state, ValueError, r"parameter 2 has \['exp_avg'\]; needed: \['\w+'"),
    "shape": (_other_shape, ValueError, r"\w+ of parameter 2 has shape \[5\]; needed: \[4\]"),
    "not_a_tensor": (_not_a_tensor, (TypeError, ValueError), r"\w+ of parameter 2 is a float"),
    "meta": (_one_without_memory, ValueError, r"\w+ of parameter \d is on device meta"),
    "sparse": (_sparse, TypeError, r"\w+ of parameter \d has layout torch.sparse_coo; needed"),
    "no_state": (_no_state, KeyError, "state"),
}


@OURS
@backends
@steps_before
@pytest.mark.parametrize(("spoil", "kind", "message"), DICTS.values(), ids=DICTS)
def test_a_state_dict_of_another_structure(cls, backend, steps, spoil, kind, message):
    saved = copy.deepcopy(Trainer(cls, backend, 1).opt.state_dict())
    spoil(saved)
    trainer = Trainer(cls, backend, steps)
    trainer.assert_stops(lambda: trainer.opt.load_state_dict(saved), kind, message)


@backends
def test_nag_is_not_stepped_at_the_iterate(backend):
    trainer = Trainer(FusedNAG, backend, 2)
    trainer.opt.eval()
    trainer.assert_stops(trainer.opt.step, RuntimeError, r"after eval\(\); call train\(\) first")
    trainer.opt.train()
    trainer.opt.step()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@backends
def test_complex_numbers_of_half_precision(backend):
    p = Parameter(torch.ones(4, dtype=torch.complex32))
    p.grad = torch.ones_like(p)
    needed = r"\['params'\]\[0\] has dtype torch\.complex32; needed: torch\.float32"
    with pytest.raises(TypeError, match=needed):
        FusedSGD([p], lr=0.1, backend=backend).step()
