"""What may happen to an optimizer between two steps, by name.

An event is done to a run with a plan and to one on the reference, which walks afresh at every step.
It returns the tensors that are no longer the optimizer's.
"""

import copy
from collections import defaultdict

import torch
from cases import FORMS, LAYOUTS, TILE, TYPES, Run, bits, values
from torch.nn import Parameter

SOME = tuple(FORMS[name] for name in ("7", "1025", "4d", "channels_last", "transposed", "scalar"))
EVENTS = {}


def event(function):
    EVENTS[function.__name__] = function
    return function


def start(variant, backend, forms=SOME, **options):
    """A run before its first step."""
    run = Run(variant, forms, TYPES["f32"], backend, **options)
    run.opt.param_groups[0].update(variant.hyper)
    run.other_state = defaultdict(dict)
    # States that are older than any change of theirs.
    run.spare = [{_key(run): torch.full_like(run.params[1], 0.3)} for _ in range(30)]
    return run


def set_grads(run, step):
    """New gradients for all parameters."""
    for i, p in enumerate(run.params):
        p.grad_dtype = None
        p.grad = values(p.shape, p.dtype, 100 * step + i).to(p.device, copy=True)


def with_copies(tensors):
    """Tensors that nobody should write any more, each with a copy; what is none is left out."""
    given = [t.detach() for t in tensors or () if isinstance(t, torch.Tensor)]
    return [(t, t.clone()) for t in given]


def assert_untouched(abandoned):
    """They are as they were."""
    for tensor, then in abandoned:
        assert torch.equal(bits(tensor), bits(then)), "written after it was replaced"


def train(variant, backend, event, at, fresh=True):
    """A run of five steps, before some of which the event happens; ``fresh``: new gradients."""
    run, abandoned = start(variant, backend), []
    for step in range(5):
        if fresh or step == 0:
            set_grads(run, step)
        if step in at:
            abandoned += with_copies(event(run))
        run.opt.step()
    assert_untouched(abandoned)
    return run


def _state(run, i):
    return run.opt.state.get(run.params[i], {})


def _key(run):
    return run.variant.rule.states[0].name


def _place(run, i):
    """The list that holds parameter i, and where; (None, 0): it was removed."""
    for group in run.opt.param_groups:
        for k, p in enumerate(group["params"]):
            if p is run.params[i]:
                return group["params"], k
    return None, 0


def _replace_state(run, i, change):
    old = _state(run, i).get(_key(run))
    if old is None:
        return []
    _state(run, i)[_key(run)] = change(old)
    return [old]


@event
def nothing(run):
    return ()


@event
def grad_is_none(run):
    run.params[1].grad = None


@event
def grad_strides(run):
    if run.params[4].grad is not None:
        run.params[4].grad = LAYOUTS["gaps"](run.params[4].grad)


@event
def grad_dtype(run):
    if run.params[1].grad is not None:
        run.params[1].grad = run.params[1].grad.bfloat16()


@event
def data(run):
    old = run.params[1].data
    run.params[1].data = old * 2
    return [old]


@event
def data_strides(run):
    old = run.params[4].data
    run.params[4].data = old.clone(memory_format=torch.contiguous_format)
    return [old]


@event
def data_dtype(run):
    old = run.params[1].data
    run.params[1].data = old.to(torch.bfloat16, copy=True)
    return [old]


@event
def data_shape(run):
    old = run.params[1].data
    run.params[1].data = old.new_ones(3 * TILE)
    run.params[1].grad = old.new_ones(3 * TILE)
    for key in [s.name for s in run.variant.rule.states if s.name in _state(run, 1)]:
        _state(run, 1)[key] = old.new_ones(3 * TILE)
    return [old]


@event
def state(run):
    return _replace_state(run, 1, lambda old: old * 2)


@event
def state_dtype(run):
    return _replace_state(run, 1, lambda old: old.to(torch.bfloat16, copy=True))


@event
def state_strides(run):
    return _replace_state(run, 4, lambda old: old.contiguous() * 2)


@event
def state_data(run):
    buffer = _state(run, 1).get(_key(run))
    if buffer is None:
        return []
    old, buffer.data = buffer.data, buffer.data * 2
    return [old]


@event
def state_of_a_parameter(run):
    run.opt.state[run.params[1]] = {_key(run): torch.full_like(run.params[1], 0.3)}


@event
def state_made_long_ago(run):
    old = list(_state(run, 1).values())
    run.opt.state[run.params[1]] = run.spare.pop()
    return old


@event
def states_exchanged(run):
    run.opt.state, run.other_state = run.other_state, run.opt.state


@event
def state_before_a_subset_without_it(run):
    old = [*_replace_state(run, 1, lambda old: old * 2), *_replace_state(run, 2, lambda old: -old)]
    run.opt.step_params([run.params[2], run.params[4]])
    return old


@event
def state_deleted(run):
    old = list(run.opt.state.pop(run.params[1], {}).values())
    return old


@event
def state_emptied(run):
    old = list(_state(run, 1).values())
    _state(run, 1).clear()
    return old


@event
def all_states_cleared(run):
    old = [t for s in run.opt.state.values() for t in s.values()]
    run.opt.state.clear()
    return old


@event
def state_is_none(run):
    old = _state(run, 1).get(_key(run))
    run.opt.state[run.params[1]][_key(run)] = None
    return [] if old is None else [old]


@event
def state_has_more(run):
    run.opt.state[run.params[1]] = {"note": "mine", **_state(run, 1)}


@event
def kept_numbers_deleted(run):
    return [_state(run, 1).pop(k.name) for k in run.variant.rule.kept if k.name in _state(run, 1)]


@event
def states_loaded(run):
    old = [t for s in run.opt.state.values() for t in s.values()]
    held = {id(p) for group in run.opt.param_groups for p in group["params"]}
    for param in [p for p in run.opt.state if id(p) not in held]:
        del run.opt.state[param]  # as torch's, a state_dict is of what is in the groups
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    return old


@event
def storage(run):
    if torch._C._is_cow_tensor(run.params[1]):
        return  # torch cannot copy it afterwards
    run.params[1].untyped_storage().resize_(2 * run.params[1].untyped_storage().nbytes())


@event
def tensors_swapped(run):
    torch.utils.swap_tensors(run.params[1], Parameter(torch.ones_like(run.params[1])))


@event
def states_swapped(run):
    if isinstance(old := _state(run, 1).get(_key(run)), torch.Tensor):
        torch.utils.swap_tensors(old, torch.ones_like(old))


@event
def flattened(run):
    old = [p.data for p in run.params]
    run.opt.flatten()
    return [t for t, p in zip(old, run.params, strict=True) if t.data_ptr() != p.data_ptr()]


@event
def parameter(run):
    old = run.params[1]
    params, k = _place(run, 1)
    run.params[1] = Parameter(torch.ones_like(old))
    run.params[1].grad = torch.ones_like(old)
    if params is not None:
        params[k] = run.params[1]
    return [old]


@event
def parameter_removed(run):
    params, k = _place(run, 1)
    return [] if params is None else [params.pop(k)]


@event
def parameter_list(run):
    group = run.opt.param_groups[0]
    group["params"] = list(reversed(group["params"]))


@event
def group(run):
    moved = run.opt.param_groups[0]["params"].pop(0)
    run.opt.add_param_group({"params": [moved], "lr": 0.5, "weight_decay": 0.3})


@event
def groups_reversed(run):
    run.opt.param_groups.reverse()


@event
def group_removed(run):
    return run.opt.param_groups.pop()["params"] if len(run.opt.param_groups) > 1 else ()


@event
def group_dict(run):
    run.opt.param_groups[0] = {**run.opt.param_groups[0], "lr": 0.5}


@event
def learning_rate_and_decay(run):
    run.opt.param_groups[0].update(lr=torch.tensor(0.02), weight_decay=0.5, maximize=True)


@event
def momentum(run):
    group = run.opt.param_groups[0]
    if "beta_cfg" in group:
        *poles, pole, _, gain, debias = group["beta_cfg"]
        group["beta_cfg"] = (*poles, 0.5 if pole == 0 else 0, 0, gain, debias)
    else:
        group["momentum"] = 0.5 if group["momentum"] == 0 else 0


@event
def number_of_the_step(run):
    if "step" in _state(run, 1):
        _state(run, 1)["step"].add_(2)  # in place


@event
def a_subset_first(run):
    run.opt.step_params(run.params[1:4])


@event
def a_subset_without_gradient(run):
    run.params[1].grad = None
    run.opt.step_params([run.params[2], run.params[1]])


@event
def scaler(run):
    """A GradScaler comes or goes; every second time it has found an overflow."""
    if hasattr(run.opt, "found_inf"):
        del run.opt.found_inf, run.opt.grad_scale
        return
    run.overflow = not getattr(run, "overflow", True)
    device = run.params[0].device
    run.opt.grad_scale = torch.tensor(4.0, device=device)
    run.opt.found_inf = torch.tensor(float(run.overflow), device=device)
