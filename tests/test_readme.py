"""The Python blocks of README.md and CONTRIBUTING.md run as they stand."""

import re
import textwrap
from pathlib import Path

import torch
from cases import CLASSES, rules

from fused_momentum import reference

README = Path(__file__).parents[1] / "README.md"


def _blocks(page=README):
    """Line number and text of every Python block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(2)].count("\n"), textwrap.dedent(match[2])


def test_the_rule_of_contributing_takes_the_steps_that_it_says():
    (_, block), *_ = _blocks(README.with_name("CONTRIBUTING.md"))
    names = {"__name__": "fused_momentum.rules.signum", "__package__": "fused_momentum.rules"}
    exec(block, names)
    hyper, (_, start), *steps = names["SIGNUM"].worked
    hyper = [hyper.get(key, 0.0) for key in names["SIGNUM"].hyper]
    p, m = torch.tensor(start), torch.zeros(len(start))
    for g, *expected in steps:
        reference.update(names["SIGNUM"], p, torch.tensor(g), [m], hyper)
        assert [p.tolist(), m.tolist()] == expected


@rules
def test_the_table_of_rules_has_a_row_for_every_class(rule):
    name = CLASSES[rule.name].__name__
    rows = re.findall(r"^\| `(\w+)` \|", README.read_text("utf-8"), re.MULTILINE)
    assert name in rows, f"README.md has no row for {name} in its table of rules"


def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    assert README.exists(), "there is no README.md"
    blocks = list(_blocks())
    assert blocks, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__readme__"}
    for line, block in blocks:
        # Blank lines in front make the numbers in a traceback those of the file.
        exec(compile("\n" * line + block, str(README), "exec"), names)
