"""The README's Python blocks run as they stand, one after the other, in one session."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def _blocks():
    """Line number and text of every Python block."""
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match[1]


def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    assert README.exists(), "there is no README.md"
    blocks = list(_blocks())
    assert blocks, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__readme__"}
    for line, block in blocks:
        # Blank lines in front make the numbers in a traceback those of the file.
        exec(compile("\n" * line + block, str(README), "exec"), names)
