"""Steps by the kernels' source beside steps by the reference."""

import torch
from cases import FORMS, LAYOUTS, RULES, TYPES, VARIANTS, Form, Variant, bits, same_bits, values
from toy_rule import TOY

from fused_momentum import reference

ALL_FORMS = tuple(FORMS.values())
F32 = TYPES["f32"]
# In the order of toys.h.
NUMBERS = {name: i for i, name in enumerate([*RULES, "toy", "totals"])}
ALL_RULES = {**RULES, "toy": TOY}
MEASURING = {name: rule for name, rule in ALL_RULES.items() if rule.measure is not None}


class ToyVariant(Variant):
    """A value for each hyper-parameter of the rule of the tests."""

    rule = TOY


def _variants():
    """Every variant by its numbers; where they depend on the number of the step, at two."""
    for key, variant in VARIANTS.items():
        rule = variant.rule
        if rule.read is None:
            yield key, variant
            continue
        for t in (2, 1):
            numbers = rule.read(variant.hyper | {"maximize": False}, t)
            hyper = dict(zip(rule.hyper, numbers, strict=True))
            yield key if t == 2 else f"{key}-first", Variant(variant.name, hyper)


TOY_VALUES = {"lr": 0.1, "momentum": 0.9, "order": 1.0, "quiet": 0.3}
ALL_VARIANTS = {
    **dict(_variants()),
    "toy": ToyVariant("toy", TOY_VALUES),
    **{
        f"toy-{key}": ToyVariant("toy", TOY_VALUES | {key: value})
        for key, value in (("momentum", 0.0), ("order", 0.0), ("quiet", 1.0))
    },
}


def defaults(rule):
    """Hyper-parameters of the first variant of a rule."""
    return next(v.hyper for v in ALL_VARIANTS.values() if v.name == rule.name)


def numbers_of(rule, hyper):
    """Hyper-parameters as the rule takes them: words are numbered."""
    return [
        float(rule.choices[key].index(value) if isinstance(value, str) else value)
        for key, value in hyper.items()
    ]


# --- tensors ---------------------------------------------------------------------------------


def make(rule, types, forms):
    """Streams p, g, *states for each form, with random values."""
    grad_type = types.grad or types.param
    made = []
    for i, form in enumerate(forms):
        p = LAYOUTS[form.layout](values(form.shape, types.param, 3 * i))
        g = LAYOUTS[form.grad_layout](values(form.shape, grad_type, 3 * i + 1))
        state_type = types.state or reference.compute_dtype(p)
        if p.is_complex():
            state_type = types.param
        states = [torch.empty_like(p, dtype=state_type) for _ in rule.states]
        for k, state in enumerate(states):
            state.copy_(values(form.shape, state_type, 3 * i + 2 + 1000 * k))
        made.append([real(t) for t in (p, g, *states)])
    return made


def real(tensor):
    """The tensor as the extension takes it: complex numbers as pairs, nothing lazy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def vectors(rule, sizes, types=F32):
    return make(rule, types, [form_of(n) for n in sizes])


def form_of(n, layout="contiguous"):
    return Form((n,), layout, layout)


def words_of(rule):
    """Words of one tensor in a table, and of one row of hyper-parameters."""
    return 1 + 2 + len(rule.states) + len(rule.kept), len(rule.hyper) + 2


def capacity(kernels, rule, large, rows=1):
    """Tensors that fit into kernel arguments, small or large, beside rows of hyper-parameters."""
    of_tensor, of_row = words_of(rule)
    return (kernels.words(large) - rows * of_row) // of_tensor


def copies(tensors):
    """The same values at the same places in new memory."""
    made = []
    for streams in tensors:
        made.append([])
        for t in streams:
            if t is not None:
                whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                t = whole.clone().as_strided(t.shape, t.stride(), t.storage_offset())
            made[-1].append(t)
    return made


def fresh_kept(rule, count):
    """The numbers of tensors that have seen no step."""
    return [
        [torch.tensor(k.initial, dtype=getattr(torch, k.dtype)) for k in rule.kept]
        for _ in range(count)
    ]


# --- steps -----------------------------------------------------------------------------------


class Step:
    """One step of given tensors, by the kernels and by the reference, in place on both sides.

    ``tensors``: [p, g, *states] each, ``kept``: their numbers, ``hyper``: by row where there are
    ``rows``. What the kernels read on the device instead, the reference is told as ``true_hyper``,
    ``true_multipliers`` and ``true_first``.
    """

    def __init__(
        self,
        kernels,
        rule,
        ours,
        truth,
        hyper,
        *,
        rows=None,
        first=None,
        kept=None,
        multipliers=None,
        true_hyper=None,
        true_multipliers=None,
        true_first=None,
        **options,
    ):
        count = len(ours)
        self.kernels, self.rule, self.ours, self.truth = kernels, rule, ours, truth
        by_row = hyper if rows else [hyper]
        rows, first = rows or [0] * count, first or [0.0] * count
        kept, true_kept = kept or (fresh_kept(rule, count), fresh_kept(rule, count))
        multipliers = multipliers or [1.0] * len(by_row)
        given = [by_row[row] for row in rows]
        self.kept = self._present(kept, rule.kept, given)
        self.true_kept = self._present(true_kept, rule.kept, given)
        states = self._present([streams[2:] for streams in ours], rule.states, given)
        self.streams = [[*s[:2], *own] for s, own in zip(ours, states, strict=True)]
        true_states = self._present([streams[2:] for streams in truth], rule.states, given)
        self.options = options | {
            "hyper": [numbers_of(rule, row) for row in by_row],
            "multipliers": multipliers,
            "rows": rows,
            "first": first,
            "kept": self.kept,
        }
        self.updates = [
            reference.Update(
                rule,
                *truth[i][:2],
                true_states[i],
                self.true_kept[i],
                numbers_of(rule, (true_hyper or by_row)[rows[i]]),
                grad_multiplier=(true_multipliers or multipliers)[rows[i]],
                first=bool((true_first or first)[i]),
            )
            for i in range(count)
        ]
        self.tensor_scalars = None

    def _present(self, given, described, hyper):
        """Those that a rule needs with these hyper-parameters; the others are None."""
        return [
            [
                None if d.when is not None and numbers_of(self.rule, h)[self.at(d.when)] == 0 else t
                for t, d in zip(own, described, strict=True)
            ]
            for own, h in zip(given, hyper, strict=True)
        ]

    def at(self, key):
        return self.rule.hyper.index(key)

    def run(self, **more):
        """One pass by the kernels."""
        return self.kernels.run(
            NUMBERS[self.rule.name],
            self.streams,
            tensor_scalars=self.tensor_scalars,
            **self.options | more,
        )

    def start_measuring(self, updates=True):
        """The measuring pass by the kernels alone."""
        tiles = sum(-(-s[0].numel() // reference.TILE) for s in self.streams)
        self.tile_sums = torch.full((self.rule.measure.sums, max(tiles, 1)), torch.nan).double()
        width = len(self.rule.tensor_scalars)
        self.tensor_scalars = torch.full((len(self.streams), width), torch.nan).double()
        return self.run(measures=1, updates=int(updates), tile_sums=self.tile_sums)

    def measure(self, updates=True):
        """The measuring pass: bits of the reference, nothing touched but what the rule says."""
        pass_ = self.rule.measure
        measured = [not update.settled() for update in self.updates]
        before = [numbers_before(update) for update in self.updates]
        result = self.start_measuring(updates)
        for update, measures in zip(self.updates, measured, strict=True):
            if measures:
                update.measure(updates)
        self._assert_same(result)
        for i, measures in enumerate(measured):
            if self.streams[i][0].numel() == 0:
                continue
            self._assert_touched(result, i, pass_, before[i] if measures else None)
            for number in self.kept[i]:
                assert number is None or result.counts.are(number, 0, int(measures))
            found = torch.tensor(self.updates[i]._tensor_scalars, dtype=torch.float64)
            assert torch.equal(bits(self.tensor_scalars[i]), bits(found))
        return result

    def update(self):
        """The update: bits of the reference, every element read and written once."""
        before = [numbers_before(update) for update in self.updates]
        result = self.run()
        for update in self.updates:
            update.update()
        self._assert_same(result)
        for i, numbers in enumerate(before):
            self._assert_touched(result, i, self.rule, numbers)
            assert all(number is None or result.counts.are(number, 0, 0) for number in self.kept[i])
        return result

    def _assert_same(self, result):
        assert (result.code, result.strays, result.misaligned) == (0, 0, 0)
        assert_same(self.ours, self.truth)
        assert_same(self.kept, self.true_kept)

    def _assert_touched(self, result, i, pass_, numbers):
        """``numbers``: what the scalars are derived from; None: nothing may have been touched."""
        names = [state.name for state in self.rule.states]
        writes = ["p", *self.rule.written] if pass_ is self.rule else pass_.writes
        reads = [1] * len(self.streams[i])
        if pass_.reads is not None and numbers is not None:
            dtype = reference.compute_dtype(self.streams[i][0])
            reads = pass_.reads(*reference.scalars_of(self.rule, numbers, dtype))
        for name, t, read in zip(["p", "g", *names], self.streams[i], reads, strict=True):
            expected = (int(read != 0), int(name in writes)) if numbers is not None else (0, 0)
            assert t is None or result.counts.are(t, *expected), f"{name} of tensor {i}"


def numbers_before(update):
    """What the reference derives the scalars of its next pass from."""
    kept = reference.numbers_of(update._rule, update._kept)
    return (*update._hyper, *update._tensor_scalars, *kept)


def check(kernels, rule, tensors, hyper, *, launches=1, **options):
    """One step of copies: its passes, each as the reference has it."""
    step = Step(kernels, rule, copies(tensors), copies(tensors), hyper, **options)
    if rule.measure is not None and "before" not in options:
        assert step.measure().launches == 2 * launches
    result = step.update()
    assert result.launches == launches
    return result


def assert_same(ours, truth):
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        for k, (x, y) in enumerate(zip(mine, true, strict=True)):
            if x is not None:
                assert same_bits(x, y), f"{k} of tensor {i} {list(x.shape)}"


def assert_untouched(result, tensors):
    assert result.strays == 0
    assert all(result.counts.are(t, 0, 0) for streams in tensors for t in streams if t is not None)
