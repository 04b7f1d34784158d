"""SGD, heavy ball and Nesterov momentum in torch's form."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..rules import RULES
from .arguments import sgd_keywords
from .base import FusedOptimizer


class FusedSGD(FusedOptimizer):
    r"""``torch.optim.SGD``, updated in one launch: the same numbers, keywords and checkpoints.

    For each parameter p with gradient g, at its step t::

        g_t = grad (negated with maximize) + weight_decay * p_t
        m_t = g_t                                             at the parameter's first step
        m_t = momentum * m_{t-1} + (1 - dampening) * g_t      afterwards
        d_t = g_t + momentum * m_t if nesterov else m_t       (g_t itself where momentum is 0)
        p_{t+1} = p_t - lr * d_t

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16,
            float16, complex64 or complex128, of any strides, on any devices, mixed.
        lr: learning rate per step, 0 or more; a number or a tensor with one element.
        momentum: fraction of the buffer that is kept per step, 0 or more. With 0 there is no
            buffer.
        dampening: fraction of the gradient that the buffer does not take in.
        weight_decay: L2 penalty, 0 or more, added to the gradient as above.
        nesterov: look one step ahead; needs momentum and no dampening.
        maximize: ascend instead of descend.
        foreach: accepted and of no effect; there is one implementation.
        differentiable: must be False.
        fused: True lets ``torch.amp.GradScaler`` leave unscaling and skipping to the step itself.
        capturable: a captured CUDA graph follows an ``lr`` that is a tensor on the parameters'
            device; no effect on CPU.
        decoupled_weight_decay: ``p_t * (1 - lr * weight_decay)`` instead of the L2 penalty.
        state_dtype: dtype of the buffer; float32 by default (float64 over float64).
        flatten: True moves the parameters into one flat buffer per device and dtype, "grads" the
            gradients too; see ``flatten()``.
        backend: "auto", or one of ``fused_momentum.backends()``; then never silently another.

    ``state[p]["momentum_buffer"]`` is a slice of a flat buffer. ``step`` changes parameters and
    buffers in place, and never gradients.

    Raises:
        ValueError: a hyper-parameter out of range, no parameters, duplicate parameters.
        RuntimeError: a back-end that was asked for cannot be used; sparse gradients.

    Source: torch.optim.SGD; Sutskever et al., "On the importance of initialization and momentum in
    deep learning" (2013), section 2.

    Example:
        >>> import torch, fused_momentum
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fused_momentum.FusedSGD([w], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     w.square().sum().backward()
        ...     optimizer.step()
        >>> w.detach()
        tensor([-0.5000, -1.0000])
    """

    rule = RULES["sgd"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        flatten: bool | str = False,
        backend: str = "auto",
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            **sgd_keywords(
                maximize,
                foreach,
                differentiable,
                fused,
                capturable=capturable,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
        }
        super().__init__(
            params, defaults, backend=backend, flatten=flatten, state_dtype=state_dtype
        )

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
