"""PyTorch's generic optimizer checks of printing, state, state_dict and hooks."""

import contextlib
import copy
import io

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_suite import INFO, Problem, grid, make, same, subjects


@grid
def test_printable(cls, kwargs):
    problem = Problem()
    text = repr(make(cls, kwargs, problem))
    assert cls.__name__ in text
    assert "lr: " in text
    assert "weight_decay: " in text


@grid
def test_state_entries_are_never_empty(cls, kwargs):
    problem = Problem()
    opt = make(cls, kwargs, problem)
    problem.train(opt)
    opt.state_dict()
    assert all(opt.state.values())


@grid
def test_deepcopy_keeps_every_public_attribute(cls, kwargs):
    problem = Problem()
    opt = make(cls, kwargs, problem)
    problem.train(opt)
    twin = copy.deepcopy(opt)
    names = {name for name in vars(opt) if not name.startswith("_")}
    assert names == {name for name in vars(twin) if not name.startswith("_")}
    for name in names | {"defaults", "state", "param_groups"}:
        assert type(getattr(opt, name)) is type(getattr(twin, name))
    for old, new in zip(opt.param_groups, twin.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old["params"], new["params"], strict=True))
        assert old.keys() == new.keys()
        assert old["lr"] == new["lr"]


def _through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ROUTES = {"in_memory": copy.deepcopy, "saved_weights_only": _through_file}
NAMES = ["unnamed", "named"]


@grid
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_loaded_state_continues_identically(cls, kwargs, route, source, target):
    def build(problem, names):
        params = problem.params
        if names == "named":
            params = list(zip(["weight", "bias"], params, strict=True))
        return cls(params, **copy.deepcopy(kwargs))

    first = Problem()
    opt = build(first, source)
    first.train(opt)
    second = copy.deepcopy(first)
    other = build(second, target)
    other.load_state_dict(state_dict=route(opt.state_dict()))
    assert ("param_names" in other.param_groups[0]) == ("named" in (source, target))
    assert first.train(opt) == second.train(other)
    assert same(first, second)


@grid
def test_loads_a_state_dict_older_than_the_flags(cls, kwargs):
    first = Problem()
    opt = make(cls, kwargs, first)
    first.train(opt)
    younger = {*INFO.not_og_supported_flags, "decoupled_weight_decay"} - kwargs.keys()
    old = copy.deepcopy(opt.state_dict())
    old["param_groups"] = [
        {k: v for k, v in group.items() if k not in younger} for group in old["param_groups"]
    ]
    second = copy.deepcopy(first)
    other = make(cls, kwargs, second)
    other.load_state_dict(old)
    assert other.param_groups[0].keys() == opt.param_groups[0].keys()
    assert first.train(opt) == second.train(other)


@grid
def test_foreign_keys_in_state_do_no_harm(cls, kwargs):
    problem = Problem()
    opt = make(cls, kwargs, problem)
    opt.state["ema"] = {"decay": 0.5}  # hooks of others do this
    problem.train(opt)
    other = make(cls, kwargs, problem)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    problem.train(other)
    assert other.state["ema"] == {"decay": 0.5}


@subjects
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_users_keep_of_a_parameter_is_loaded(cls, momentum):
    """As wrappers do that keep slow weights; one parameter is frozen, and has nothing else."""
    problem = Problem()
    opts = [make(cls, {}, problem) for _ in range(2)]
    frozen, *_ = params = opts[0].param_groups[0]["params"]
    for opt in opts:
        for group in opt.param_groups:
            group |= {"momentum": momentum} if "momentum" in group else {}
        problem.train(opt)
    opts[0].state.pop(frozen, None)
    for p in params:
        opts[0].state[p]["slow"] = p.detach() * 2
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for p in params:
        assert torch.equal(opts[1].state[p]["slow"], opts[0].state[p]["slow"])
        assert opts[1].state[p].keys() == opts[0].state[p].keys()


# --- hooks -----------------------------------------------------------------------------------


@subjects
def test_step_hooks_fire_once_each_and_in_order(cls):
    problem, calls = Problem(), []
    opt = make(cls, {}, problem)
    with contextlib.ExitStack() as stack:
        for register, name in [
            (register_optimizer_step_pre_hook, "global pre"),
            (opt.register_step_pre_hook, "pre"),
            (opt.register_step_post_hook, "post"),
            (register_optimizer_step_post_hook, "global post"),
        ]:
            handle = register(lambda *_, name=name: calls.append(name))
            stack.callback(handle.remove)
        opt.step(problem.closure)
    assert calls == ["global pre", "pre", "post", "global post"]
    opt.step(problem.closure)
    assert len(calls) == 4


@subjects
def test_a_hook_may_give_the_step_its_closure(cls):
    opt = make(cls, {}, Problem())
    opt.register_step_pre_hook(lambda opt, args, kwargs: (args, kwargs | {"closure": lambda: 7}))
    assert opt.step() == 7


@subjects
@pytest.mark.parametrize("prepend", [False, True], ids=["appended", "prepended"])
def test_state_dict_hooks(cls, prepend):
    problem, calls = Problem(), []
    opt = make(cls, {}, problem)
    for name in "ab":
        opt.register_state_dict_pre_hook(lambda _, n=name: calls.append("pre " + n), prepend)
        opt.register_state_dict_post_hook(
            lambda _, state, n=name: calls.append("post " + n) or {**state, n: 1}, prepend
        )
    saved = opt.state_dict()
    order = "ba" if prepend else "ab"
    assert calls == [f"{when} {n}" for when in ("pre", "post") for n in order]
    assert saved["a"] == saved["b"] == 1


@subjects
@pytest.mark.parametrize("prepend", [False, True], ids=["appended", "prepended"])
def test_load_state_dict_hooks(cls, prepend):
    problem, calls = Problem(), []
    opt = make(cls, {}, problem)
    saved = copy.deepcopy(opt.state_dict())

    def halve_lr(_, state, name):
        calls.append("pre " + name)
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] /= 2
        return state

    for name in "ab":
        opt.register_load_state_dict_pre_hook(lambda o, s, n=name: halve_lr(o, s, n), prepend)
        opt.register_load_state_dict_post_hook(lambda _, n=name: calls.append("post " + n), prepend)
    opt.load_state_dict(saved)
    order = "ba" if prepend else "ab"
    assert calls == [f"{when} {n}" for when in ("pre", "post") for n in order]
    assert opt.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] / 4
