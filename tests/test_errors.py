"""Bad arguments, options and parameters raise and say what was given and what is needed."""

import pytest
import torch
from cases import CLASSES
from torch.nn import Parameter

from fused_momentum import FusedMomentum, FusedNAG, FusedSGD, FusedSGDSaI

OURS = pytest.mark.parametrize("cls", CLASSES.values(), ids=lambda cls: cls.__name__)
ALL = (FusedSGD, FusedMomentum, FusedNAG, FusedSGDSaI)
SAI = [FusedSGDSaI]
ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def _param(*shape, **options):
    return Parameter(torch.ones(*shape, **options))


# --- arguments of the constructor and of add_param_group -------------------------------------

NAN = float("nan")
ARGUMENT_ERRORS = {
    "lr_negative": ({"lr": -0.1}, ValueError, "Invalid learning rate: -0.1", ALL),
    "lr_nan": ({"lr": NAN}, ValueError, "Invalid learning rate: nan", ALL),
    "lr_negative_tensor": (
        {"lr": torch.tensor(-0.5)},
        ValueError,
        r"Invalid learning rate: .*-0\.5",
        ALL,
    ),
    "lr_of_two": ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element", ALL),
    "momentum": ({"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5", ALL),
    "momentum_nan": ({"momentum": NAN}, ValueError, "Invalid momentum value: nan", ALL),
    "weight_decay": ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1", ALL),
    "nesterov_alone": (
        {"momentum": 0, "nesterov": True},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
        [FusedSGD],
    ),
    "nesterov_damped": (
        {"dampening": 0.5, "nesterov": True},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
        [FusedSGD],
    ),
    "dampening": ({"dampening": 0.5}, ValueError, "has no dampening.*0.5", ALL[1:]),
    "nesterov": ({"nesterov": True}, ValueError, "no nesterov switch.*True", ALL[1:]),
    "momentum_one": (
        {"momentum": 1.0},
        ValueError,
        r"Invalid momentum value: 1\.0; needed: below 1",
        SAI,
    ),
    "eps": ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08", SAI),
    "eps_nan": ({"eps": NAN}, ValueError, "Invalid epsilon value: nan", SAI),
    "scale": (
        {"scale": "snr"},
        ValueError,
        r"scale='snr' is not one of \['gsnr', 'gsnr_max', 'sqrt_numel'\]",
        SAI,
    ),
    "degenerate": (
        {"degenerate": None},
        ValueError,
        r"degenerate=None is not one of \['bound', 'official', 'defer'\]",
        SAI,
    ),
    "text_for_weight_decay": (
        {"weight_decay": "0.1"},
        TypeError,
        r"weight_decay is '0.1' \(str\); needed: a number",
        [FusedSGD, FusedMomentum, FusedNAG, FusedSGDSaI],
    ),
    "none_for_lr": ({"lr": None}, TypeError, r"lr is None \(NoneType\); needed: a number", SAI),
    "differentiable": (
        {"differentiable": True},
        RuntimeError,
        r"differentiable=True is not supported.*torch\.optim\.SGD",
        ALL,
    ),
    "fused_foreach": (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
        ALL,
    ),
}
argument_errors = pytest.mark.parametrize(
    ("cls", "given", "kind", "message"),
    [
        pytest.param(cls, given, kind, message, id=f"{cls.__name__}-{name}")
        for name, (given, kind, message, classes) in ARGUMENT_ERRORS.items()
        for cls in classes
    ],
)


@argument_errors
def test_bad_arguments(cls, given, kind, message):
    with pytest.raises(kind, match=message):
        cls([_param(3)], **ARGUMENTS | given)


@argument_errors
def test_bad_arguments_of_a_new_group(cls, given, kind, message):
    optimizer = cls([_param(3)], **ARGUMENTS)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": [_param(2)], **given})
    assert len(optimizer.param_groups) == 1


OPTION_ERRORS = {
    "flatten": ({"flatten": "all"}, "flatten='all' is not one of False, True, 'grads'"),
    "state_dtype": ({"state_dtype": torch.int32}, "state_dtype=torch.int32 is not one of"),
    "state_dtype_of_8_bits": ({"state_dtype": torch.float8_e5m2}, "state_dtype=torch.float8_e5m2"),
    "state_dtype_as_text": ({"state_dtype": "float32"}, "state_dtype='float32' is not one of None"),
    "backend": ({"backend": "gpu"}, "backend='gpu' is not one of .'auto', 'reference', 'cpu'"),
}


@OURS
@pytest.mark.parametrize(("given", "message"), OPTION_ERRORS.values(), ids=OPTION_ERRORS)
def test_bad_options(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls([_param(3)], lr=0.1, **given)


P = _param(3)
PARAMS_ERRORS = {
    "empty": ([], ValueError, "empty parameter list"),
    "not_tensors": ([1.0], TypeError, "float"),
    "one_tensor": (P, TypeError, "iterable"),
    "not_a_leaf": ([P * 2], ValueError, "non-leaf"),
    "twice": ([P, _param(2), P], ValueError, r"duplicate.*params\[0\] and params\[2\]"),
    "twice_by_name": ([("a", P), ("b", P)], ValueError, r"duplicate.*params\[0\] and params\[1\]"),
    "in_two_groups": ([{"params": [P]}, {"params": [P]}], ValueError, "more than one.* group"),
    "set": ([{"params": {P}}], TypeError, "set"),
    "no_params": ([{"parms": [P]}], KeyError, r"no 'params'; its keys: \['parms'"),
    "model": (torch.nn.Linear(2, 2), TypeError, r"params is a Linear; .* model.parameters\(\)"),
}


@OURS
@pytest.mark.parametrize(("params", "kind", "message"), PARAMS_ERRORS.values(), ids=PARAMS_ERRORS)
def test_bad_parameters(cls, params, kind, message):
    with pytest.raises(kind, match=message):
        cls(params, lr=0.1)


@OURS
def test_bad_parameters_of_a_new_group(cls):
    first = _param(3)
    optimizer = cls([first], lr=0.1)
    for params, kind in (([first], ValueError), ([1.0], TypeError), ({_param(2)}, TypeError)):
        with pytest.raises(kind):
            optimizer.add_param_group({"params": params})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]


@OURS
def test_groups_may_be_given_generators(cls):
    first, second = _param(3), _param(2)
    optimizer = cls([{"params": (p for p in [first])}], lr=0.1)
    optimizer.add_param_group({"params": (p for p in [second])})
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]


def test_two_numbers_for_one_are_an_error():
    with pytest.raises(TypeError, match=r"weight_decay is tensor.* \(Tensor\); needed: a number"):
        FusedSGD([_param(3)], lr=0.1, weight_decay=torch.ones(2))
