"""AutoSGM in float64, one tensor at a time, as plainly as it can be told: what kernels must equal.

A filter, a window, and a step, each of which remembers what it needs and does what the formulas say
in the order in which they say it. ``compat="v1"`` is the published arithmetic with its slips,
``compat="fixed"`` the same with each of them mended; every such place asks ``self.v1``.
"""

import ctypes
import math

import torch

LR = (True, 1e-2, 0)  # moment estimator, mu, numerator
BETA = (0.9999, 0.999, 0.9, 0.0, 0, True)  # beta_n, beta_a, beta, gamma, eta, debias
WINDOW = (0, 0, 0, 2, 1, 1000, 1, 1, 0)  # shape, order, x, n, half, tau, spe, cfact, e
GOLDEN = (math.sqrt(5) - 1) / 2


class Filter:
    """First-order lowpass filter with pole beta, zero gamma and input gain eta (0: 1 - beta)."""

    def __init__(self):
        self.s = 0.0
        self.t = 0

    def __call__(self, x, beta, gamma=0.0, eta=0, debias=False, divides_first=True):
        self.t += 1
        h = 1 - beta if eta == 0 else eta
        y = self.s + h * x
        self.s = beta * y - gamma * h * x
        if self.t > 1 or divides_first:
            y = y / (1 - gamma)
        if debias:
            y = y * ((1 - beta) / h) / (1 - beta**self.t)
        return y


class WindowModel:
    """The factor of the learning rate at t = 1, 2, ...: call ``next()`` once per update."""

    def __init__(self, rc_cfg=WINDOW, compat="fixed"):
        self.shape, self.order, self.x, self.n, self.half, self.tau, self.spe, c, self.flat = rc_cfg
        self.v1 = compat == "v1"
        self.by_epoch = c == 0
        self.length = {0: self.tau, 2: self.spe}.get(c, self.tau * self.spe)
        self.stairs = c if c > 2 else 1
        self.t = self.epoch = self.start = 0

    def next(self):
        self.t += 1
        # The published one counts an epoch every tau steps, and none at all where tau is 1.
        if self.t % self.tau == 1 if self.v1 else (self.t - 1) % self.spe == 0:
            self.epoch += 1
        if self.shape == 0:
            return 1.0
        index = (self.epoch if self.by_epoch else self.t) - 1
        if self.order == 1:
            return self.sorted_values()[index % self.length]
        if self.v1:
            return self.published(index)
        return self.factor(index % self.length / self.length)

    def published(self, index):
        """As published: the window begins anew only where its last index passes the flat top."""
        index -= self.start
        phi = (self.start - 1 if index < 0 else index) / self.length
        if not self.is_flat(phi) and index == self.length - 1:
            self.start += self.length
        return self.factor(phi)

    def folded(self, phi):
        return phi if self.half else abs(2 * phi - 1)

    def is_flat(self, phi):
        return self.folded(phi) < self.flat or self.flat == 1

    def factor(self, phi):
        if self.is_flat(phi):
            return 1.0
        return self.at((self.folded(phi) - self.flat) / (1 - self.flat))

    def at(self, phi):
        """The factor where the fraction phi of the descent is behind."""
        m, n = self.stairs, self.n
        if self.shape == 2:
            value = (1 - phi) ** n
        elif self.shape == 5:
            value = (self.steps(phi) - self.steps(1)) / (self.steps(0) - self.steps(1))
        else:
            stair = max(1, math.ceil(m * phi))
            value = (m - stair + self.descent(m * phi - stair + 1)) / m
        return self.x + (1 - self.x) * value

    def steps(self, phi):
        """A logistic descent in the middle of each of the stairs."""
        m = self.stairs
        exponents = (2 * m * self.n * (phi - (j + 0.5) / m) for j in range(m))
        return sum(1 / (1 + 2 ** min(exponent, 1023)) for exponent in exponents) / m

    def descent(self, u):
        """From 1 at u = 0 to 0 at u = 1."""
        n = self.n
        if self.shape == 1:
            return math.cos(math.pi * u / 2) ** n
        if self.shape == 3:
            return (n**u - n) / (1 - n)
        if self.shape == 4:
            return (1 - u**n) ** 2

        def late(u):
            return 1 / (1 + 2 ** (2 * n * (u - 7 / 8)))

        # The published one takes the ends of the logistic function that has its middle at 1/2.
        high, low = (1 / (1 + 2**-n), 1 / (1 + 2**n)) if self.v1 else (late(0), late(1))
        return (late(u) - low) / (high - low)

    def sorted_values(self):
        """Kronecker order: the values at the points frac(j * golden ratio), sorted."""
        halves = 1 if self.half else 2
        span = self.length / halves
        flat = int(self.flat * span)
        points = int(span - flat)
        ones = self.length - halves * points
        if self.v1:  # one too many where the length is odd, and the polynomial draws them all
            ones = halves * (flat + 1 if halves * (points + flat) < self.length else flat)
            points = self.length if self.shape == 2 else points
        down = sorted((self.at(j * GOLDEN % 1) for j in range(points)), reverse=True)
        if self.half:
            return [1.0] * ones + down
        return down[::-1] + [1.0] * ones + down


class Model:
    """One tensor: ``step(grad)`` moves ``w``. The settings may be changed between steps."""

    def __init__(
        self,
        param,
        *,
        lr_cfg=LR,
        beta_cfg=BETA,
        rc_cfg=WINDOW,
        wd_cfg=(0.0, 0),
        eps_cfg=(1e-10,),
        maximize=False,
        compat="fixed",
    ):
        self.w = param.detach().double().clone()
        self.lr_cfg, self.beta_cfg, self.wd_cfg, self.eps_cfg = lr_cfg, beta_cfg, wd_cfg, eps_cfg
        self.maximize, self.v1 = maximize, compat == "v1"
        self.window = WindowModel(rc_cfg, compat)
        self.m, self.q, self.pc, self.wsq, self.pcx = (Filter() for _ in range(5))
        self.r = self.c1 = self.c2 = 0.0
        self.t = 0

    def step(self, grad):
        estimates, _, numerator = self.lr_cfg
        _, beta_a, beta, gamma, eta, debias = self.beta_cfg
        wd, decoupled = self.wd_cfg
        (eps,) = self.eps_cfg
        g = grad.double()
        self.t += 1
        f = self.window.next()
        if self.v1 and self.t == 1:
            self.w = torch.where(self.w.abs() < eps, self.w + eps, self.w)
        if self.maximize and not self.v1:
            g = -g
        if not decoupled:
            g = g + wd * self.w
        v = self.m(g, beta, gamma, eta, debias, divides_first=not self.v1)
        d = 1.0
        if estimates:
            d = self.q((g + eps) ** 2, beta_a, 0.0, eta, debias).sqrt() + eps
        u, v = g / d, v / d
        if decoupled:
            v = v + (1 - beta) / (1 - gamma) * wd * self.w
        if estimates and numerator == 4 and not self.v1:
            v = self.limited(v)
        a = self.numerator(u, v)
        self.w = self.w + f * a * v if self.maximize and self.v1 else self.w - f * a * v

    def limited(self, v):
        """Numerator 4: the whole tensor shortened where it is far from the usual length."""
        beta_n, (eps,) = self.beta_cfg[0], self.eps_cfg
        self.c1 = beta_n * self.c1 + (1 - beta_n) * v.norm()
        distance = (v - self.c1).norm() + eps
        self.c2 = beta_n * self.c2 + (1 - beta_n) * distance**2
        return v / distance * min(distance, 4 * (self.c2**0.5 + eps))

    def numerator(self, u, v):
        """The learning rate of this step, a number for the tensor."""
        estimates, mu, numerator = self.lr_cfg
        beta_n, beta_a, beta = self.beta_cfg[:3]
        if not estimates:
            return mu
        if self.v1:
            mu = ctypes.c_float(mu).value
        if numerator in (0, 4):
            return mu
        if numerator == 3:
            o = self.pc(mu * u * u, beta_n).clamp(max=mu)
        else:
            c = 1 + self.wsq(self.w * self.w, beta_n)
            x = self.w * v
            if numerator == 2:
                pole = beta_n if self.v1 and beta == 0 else beta_a
                limit = 4 * self.pcx(x.abs(), pole)
                x = x.sign() * torch.minimum(x.abs(), limit) / c
            o = torch.minimum(self.pc(mu * x, beta_n, eta=1).abs(), mu * c)
        self.r = 0.1 * self.r + 0.9 * o.mean()
        return self.r
