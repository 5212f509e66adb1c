"""The same loss and gradient whether a batch lies on 1, 2 or 8 devices. Slow: CI runs it by itself."""
import json
import subprocess
import sys

import pytest

from rl_jax import sections
from tests.ends import tiny

NAMES = sections.names("rl_jax.recipes")
SHARE = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SHARE))
def test_devices_change_nothing(part):
    names = NAMES[part::SHARE]
    done = subprocess.run([sys.executable, "-m", "tests.recipes.on_devices", *names], cwd=tiny.ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == sorted(names)
    worst = {name: max(by_count.values()) for name, by_count in found.items()}
    assert {name: value for name, value in worst.items() if value > 1e-10} == {}
