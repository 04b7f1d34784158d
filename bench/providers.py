"""What is compared: for each rule our optimizer, and what a user could take instead.

A rule is a row of `RULES`, a competitor a `Provider`; everything else loops over them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

import fused_momentum as fm
from bench import formulas
from bench.formulas import Plain

SGD_HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
SAI_HYPER = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}
LR = {"lr": 1e-2}
OURS, FOR_LOOP, FOREACH, FUSED = "ours", "torch for-loop", "torch foreach", "torch fused"
COMPILED, OURS_SGD, ADAMW = "torch compiled", "ours, SGD", "torch AdamW fused"
HEAVYBALL = "heavyball, eager"


@dataclass(frozen=True)
class Provider:
    """A way to take the step; `make(params)` returns an optimizer.

    `truth(params)` takes the same step with plain torch operators and is what the gate compares
    with; None where the provider has another rule than anything written here, and the gate only
    sees to it that parameters move, stay finite and gradients stay as they are. With `whole` an
    update depends on all elements of its tensor.
    """

    name: str
    make: Callable[[list[Tensor]], object]
    truth: Callable[[list[Tensor]], object] | None = None
    module: str = "torch"
    package: str = "torch"  # as pip knows it
    needs_gpu: bool = False
    compiles: bool = False  # takes a while before its first step
    roundings: int = 1  # of a parameter in a step, for each one of the truth's
    stochastic: bool = False  # rounds bf16 up or down at random: errs by up to an ulp, not half
    whole: bool = False
    states: int = 1  # tensors of the parameters' size that it keeps
    second_pass: int = 0  # bytes an fp32 parameter that it must move besides its own streams

    @property
    def is_ours(self) -> bool:
        """Whether this is one of this project."""
        return self.module == "fused_momentum"

    def absent(self, device: torch.device) -> str:
        """Why it cannot run here, or an empty string."""
        if self.needs_gpu and device.type != "cuda":
            return "skipped: needs a GPU"
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError:
            return f"skipped: not installed (pip install {self.package})"
        except Exception as error:  # whatever somebody else's package raises when it is imported
            return f"skipped: does not import: {first_line(error)}"
        return ""

    def version(self) -> str:
        """The version of its package."""
        return torch.__version__ if self.module == "torch" else metadata.version(self.package)


@dataclass(frozen=True)
class Rule:
    """A row of the table: our optimizers, the first of which the others are compared with.

    Where memory does not suffice for all, the last peers are left out.
    """

    ours: tuple[Provider, ...]
    peers: tuple[Provider, ...]
    cases: tuple[str, ...] = ()  # () means all
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    share: float = 0.1  # of the time for all rules
    times_first: bool = False  # whether a new optimizer's first step is timed too

    @property
    def providers(self) -> tuple[Provider, ...]:
        """Ours and the peers."""
        return (*self.ours, *self.peers)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Compiled:
    """A torch optimizer whose step is compiled, once its state exists."""

    def __init__(self, optimizer):
        self.optimizer, self.state = optimizer, optimizer.state
        # Each case has an optimizer of its own, and the compiled code is for one of them.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 64
        self.compiled = torch.compile(optimizer.step)

    def step(self) -> None:
        """One step."""
        (self.compiled if self.state else self.optimizer.step)()


def torch_sgd(params, foreach=False, fused=False, **hyper):
    return SGD(params, **SGD_HYPER | hyper, foreach=foreach, fused=fused)


def compiled_sgd(params, **hyper):
    return Compiled(torch_sgd(params, foreach=True, **hyper))


def package(name: str, module: str, cls: str, truth, hyper=SGD_HYPER, pip="", **fields) -> Provider:
    """The optimizer `cls` of an installed package."""

    def make(params):
        return getattr(importlib.import_module(module), cls)(params, **hyper)

    return Provider(name, make, truth, module, pip or module, **fields)


def heavyball_sgd(params):
    import heavyball

    # Its own compilation of this step takes over seven minutes for ResNet-50 on two cores.
    heavyball.utils.compile_mode = None
    lr, momentum, decay = SGD_HYPER.values()
    optimizer = heavyball.SGD(params, lr=lr, beta=momentum, weight_decay=decay)
    optimizer.consume_grad = False  # or p.grad is None after a step
    return optimizer


def ours(cls: str, **hyper) -> Callable:
    """A constructor of our class `cls`; it takes further options, `backend` for one."""

    def make(params, **options):
        return getattr(fm, cls)(params, **hyper, **options)

    return make


def autosgm(numerator: int | None, name: str, states: int, second_pass: int = 0) -> Provider:
    """AutoSGM with a numerator, or with a constant learning rate."""
    return Provider(
        name,
        ours("FusedAutoSGM", lr_cfg=(numerator is not None, LR["lr"], numerator or 0)),
        partial(Plain, formula=formulas.autosgm, numerator=numerator, **LR),
        **OWN,
        whole=numerator in (1, 2, 3),
        states=states,
        second_pass=second_pass,
    )


OWN = {"module": "fused_momentum", "package": "fused_momentum"}
TRUE_SGD = torch_sgd
TRUE_NESTEROV = partial(torch_sgd, nesterov=True)
TRUE_DECOUPLED = partial(Plain, formula=formulas.decoupled_sgd, **SGD_HYPER)
TRUE_SAI = partial(Plain, formula=formulas.sgd_sai, **SAI_HYPER)
TRUE_SAI_MATRICES = partial(Plain, formula=formulas.sgd_sai_matrices, **SAI_HYPER)


def torch_variants(truth: Callable, **hyper) -> tuple[Provider, ...]:
    """The four ways of torch.optim.SGD."""
    return (
        Provider(FOR_LOOP, partial(torch_sgd, **hyper), truth),
        Provider(FOREACH, partial(torch_sgd, foreach=True, **hyper), truth),
        Provider(FUSED, partial(torch_sgd, fused=True, **hyper), truth),
        Provider(COMPILED, partial(compiled_sgd, **hyper), truth, compiles=True),
    )


SGD_ROW = Provider(OURS, ours("FusedSGD", **SGD_HYPER), TRUE_SGD, **OWN)
ADAMW_ROW = Provider(ADAMW, partial(AdamW, fused=True, **LR), states=2)
ADAMW_FOREACH_ROW = replace(
    ADAMW_ROW, name="torch AdamW foreach", make=partial(AdamW, foreach=True, **LR)
)
# Decay and compensation that optimi would write into the gradients, as pytorch_optimizer its decay,
# are done without.
OPTIMI_HYPER = SGD_HYPER | {"decouple_wd": True, "kahan_sum": False}
PACKAGES = (
    package("optimi", "optimi", "SGD", TRUE_DECOUPLED, OPTIMI_HYPER, "torch-optimi"),
    Provider(HEAVYBALL, heavyball_sgd, TRUE_DECOUPLED, "heavyball", "heavyball", stochastic=True),
    package("pytorch_optimizer", "pytorch_optimizer", "SGDW", TRUE_DECOUPLED),
    package("apex", "apex.optimizers", "FusedSGD", TRUE_SGD, pip="apex", needs_gpu=True),
    package(
        "TransformerEngine",
        "transformer_engine.pytorch.optimizers",
        "FusedSGD",
        TRUE_SGD,
        pip="transformer_engine",
        needs_gpu=True,
    ),
    package("bitsandbytes", "bitsandbytes.optim", "SGD32bit", TRUE_SGD, pip="bitsandbytes"),
    package("bitsandbytes 8-bit", "bitsandbytes.optim", "SGD8bit", None, pip="bitsandbytes"),
    package("flashoptim 8-bit", "flashoptim", "FlashSGD", None, needs_gpu=True),
)

RULES: dict[str, Rule] = {
    "sgd": Rule((SGD_ROW,), (*torch_variants(TRUE_SGD), *PACKAGES), share=0.5),
    # With a constant learning rate these two walk the same path as torch's forms.
    "momentum": Rule(
        (Provider(OURS, ours("FusedMomentum", **SGD_HYPER), TRUE_SGD, **OWN),),
        torch_variants(TRUE_SGD),
        ("3000x1024", "resnet50", "gpt2_124m"),
    ),
    "nag": Rule(
        # To the iterate, a step, and to the look-ahead point: p is rounded three times.
        (Provider(OURS, ours("FusedNAG", **SGD_HYPER), TRUE_NESTEROV, **OWN, roundings=3),),
        torch_variants(TRUE_NESTEROV, nesterov=True),
        ("3000x1024", "resnet50", "gpt2_124m"),
    ),
    "sgd_sai": Rule(
        (Provider(OURS, ours("FusedSGDSaI", **SAI_HYPER), TRUE_SAI, **OWN, whole=True),),
        (
            package("sgd-sai", "sgd_sai", "SGD_sai", TRUE_SAI, SAI_HYPER, "sgd-sai", whole=True),
            replace(SGD_ROW, name=OURS_SGD),
            ADAMW_ROW,
            Provider(FUSED, partial(torch_sgd, fused=True), TRUE_SGD),
            package(
                "pytorch_optimizer",
                "pytorch_optimizer",
                "SGDSaI",
                TRUE_SAI_MATRICES,
                SAI_HYPER,
                whole=True,
            ),
            Provider("plain torch", TRUE_SAI, TRUE_SAI, whole=True),
        ),
        ("gpt2_124m_small", "vit_s16", "gpt2_124m", "vit_h14", "gpt2_xl", "llama_7b"),
        ("float32",),
        share=0.2,
        times_first=True,
    ),
    "autosgm": Rule(
        (
            autosgm(0, OURS, 2),
            autosgm(None, "ours, constant", 1),
            autosgm(1, "ours, numerator 1", 4, second_pass=12),
            autosgm(2, "ours, numerator 2", 5, second_pass=12),
            autosgm(3, "ours, numerator 3", 3, second_pass=8),
        ),
        (
            ADAMW_ROW,
            replace(ADAMW_ROW, name="torch AdamW foreach", make=partial(AdamW, foreach=True, **LR)),
        ),
        ("resnet50", "3000x1024", "llama_1b"),
        ("float32",),
        share=0.2,
    ),
}


def chosen(rule: Rule, peers: list[str] | None) -> list[Provider]:
    """Ours, and those peers of a rule that are named (None: all)."""
    named = [p for p in rule.peers if peers is None or p.name in peers or p.package in peers]
    return [*rule.ours, *named]


def tensors_in(value) -> list[Tensor]:
    """The tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (dict, list, tuple)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [tensor for item in inner for tensor in tensors_in(item)]


def state_dtypes(optimizer, param: Tensor) -> list[torch.dtype]:
    """The dtypes of those states of `param` that have its shape."""
    found = tensors_in(optimizer.state.get(param, {}))
    return [tensor.dtype for tensor in found if tensor.shape == param.shape]


def state_bytes(optimizer) -> int:
    """Bytes of all state, each buffer counted once."""
    storages = [t.untyped_storage() for t in tensors_in(dict(optimizer.state))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_moved(numel: int, param: torch.dtype, states: list[torch.dtype], second_pass=0) -> int:
    """Bytes that one step must read and write: p twice, g once, and each state twice.

    Gradients have the dtype of their parameter. fp32 with momentum: 20 bytes an element.
    """
    streams = 3 * param.itemsize + 2 * sum(dtype.itemsize for dtype in states)
    return numel * (streams + second_pass)


def bytes_needed(numel: int, dtypes, providers) -> int:
    """Bytes that a case needs: p, g, every provider's states, and the largest temporary."""
    total = max(dtype.itemsize for dtype in dtypes)  # foreach adds the decay out of place
    for dtype in dtypes:
        state = sum((4 if p.is_ours else dtype.itemsize) * p.states for p in providers)
        total += 2 * dtype.itemsize + state
    return numel * total
