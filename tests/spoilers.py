"""What may be done to an optimizer between two steps so that the next one may have to refuse it.

As in events.py: a spoiler is done to a run, and returns the tensors that nobody may write any more.
"""

import torch
from events import _key, _state

SPOILERS = {}


def spoiler(function):
    SPOILERS[function.__name__] = function
    return function


def _lazy_clones(*tensors):
    """Clones that are made when one of the two is written; torch makes none of our own buffers."""
    clones = []
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.numel() and t.layout == torch.strided:
            try:
                clones.append(torch._lazy_clone(t.detach()))
            except RuntimeError:
                continue
    return clones


def _grad(run):
    grad = run.params[1].grad
    return grad if grad is not None and grad.layout == torch.strided else None


def _give(run, grad):
    run.params[1].grad_dtype = None
    run.params[1].grad = grad


# --- gradients and parameters --------------------------------------------------------------------


@spoiler
def parameter_lazily_cloned(run):
    return _lazy_clones(run.params[1])


@spoiler
def parameter_negated(run):
    run.params[2].data = torch._neg_view(run.params[2].data)


@spoiler
def parameter_without_elements(run):
    run.params[1].data, run.params[1].grad = run.params[1].data.new_empty(0), None
    run.params[1].grad = run.params[1].data.new_empty(0)
    _state(run, 1).clear()


@spoiler
def grad_negated(run):
    if (grad := _grad(run)) is not None:
        run.params[1].grad = torch._neg_view(grad)


@spoiler
def grad_resized(run):
    if (grad := _grad(run)) is not None and grad.numel():
        grad.resize_(grad.numel() - 1)


@spoiler
def grad_of_another_dimension(run):
    if (grad := _grad(run)) is not None:
        grad.resize_(grad.numel(), 1)


@spoiler
def grad_in_its_parameter(run):
    run.params[1].grad = run.params[1].detach()


@spoiler
def grad_sparse(run):
    if (grad := _grad(run)) is not None:
        _give(run, grad.to_sparse())


@spoiler
def grad_of_integers(run):
    if (grad := _grad(run)) is not None:
        _give(run, grad.int())


@spoiler
def grad_given_back(run):
    """Its memory; whoever reads it must not come after this."""
    if (grad := _grad(run)) is not None and grad.data_ptr() != run.params[1].data_ptr():
        grad.untyped_storage().resize_(0)


# --- states and numbers --------------------------------------------------------------------------


@spoiler
def state_lazily_cloned(run):
    if isinstance(old := _state(run, 1).get(_key(run)), torch.Tensor):
        _state(run, 1)[_key(run)] = old.clone()
        return _lazy_clones(_state(run, 1)[_key(run)])


@spoiler
def state_resized(run):
    old = _state(run, 1).get(_key(run))
    if isinstance(old, torch.Tensor) and old.layout == torch.strided and old.numel() > 2:
        old.resize_(old.numel() - 1)


@spoiler
def numbers_lazily_cloned(run):
    keys = [*(k.name for k in run.variant.rule.kept), "step"]
    held = _state(run, 1)
    held.update({key: held[key].clone() for key in keys if isinstance(held.get(key), torch.Tensor)})
    return _lazy_clones(*map(held.get, keys))


@spoiler
def numbers_of_one_dimension(run):
    held = _state(run, 1)
    for key in (k.name for k in run.variant.rule.kept):
        if isinstance(held.get(key), torch.Tensor):
            held[key] = held[key].reshape(1).clone()


@spoiler
def numbers_of_another_type(run):
    held = _state(run, 1)
    for key in (k.name for k in run.variant.rule.kept):
        if isinstance(held.get(key), torch.Tensor):
            held[key] = held[key].half()


@spoiler
def count_of_steps_gone(run):
    _state(run, 1).pop("step", None)


@spoiler
def count_of_steps_no_tensor(run):
    if "step" in _state(run, 1):
        _state(run, 1)["step"] = 2


# --- groups --------------------------------------------------------------------------------------


@spoiler
def text_for_lr(run):
    run.opt.param_groups[-1]["lr"] = "0.1"


@spoiler
def lr_again(run):
    for group in run.opt.param_groups:
        group["lr"] = 0.1


@spoiler
def key_gone(run):
    run.opt.param_groups[0].pop("maximize", None)


@spoiler
def key_again(run):
    for group in run.opt.param_groups:
        group["maximize"] = False


@spoiler
def parameter_no_tensor(run):
    params = run.opt.param_groups[0]["params"]
    if params and isinstance(params[0], torch.Tensor):
        run.taken, params[0] = params[0], 1.0


@spoiler
def parameter_again(run):
    for group in run.opt.param_groups:
        group["params"] = [p if isinstance(p, torch.Tensor) else run.taken for p in group["params"]]
