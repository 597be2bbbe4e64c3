"""Every tool runs by its path and as a module, and its help has an example."""

import re

import pytest

from tests import ROOT
from tests.tools.forked_python import call

TOOLS = [
    str(path.relative_to(ROOT))
    for path in sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "tools/bench").glob("*.py")])
    if '__name__ == "__main__"' in path.read_text()
]


def test_all_tools_are_found():
    assert {"tools/prepare_data.py", "tools/bench/sharding.py"} < set(TOOLS)


@pytest.mark.parametrize("as_module", [False, True], ids=["by path", "as a module"])
@pytest.mark.parametrize("tool", TOOLS)
def test_help_has_an_example(tool, as_module):
    done = call(tool, "--help", as_module=as_module)
    assert done.status == 0, done.stderr
    assert re.search(rf"^ +(python|deepspeed .*) {tool} ", done.stdout, re.MULTILINE), done.stdout
    assert "usage: " in done.stdout
