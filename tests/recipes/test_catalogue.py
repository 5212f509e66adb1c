"""The catalogue is what the recipes say, and says it of all of them."""
import subprocess
import sys

import pytest

from rl_jax import recipe, sections
from tests.ends import tiny

CATALOGUE = tiny.ROOT / "rl_jax/recipes/CATALOGUE.md"


def run(*arguments):
    return subprocess.run([sys.executable, "scripts/catalogue.py", *arguments], cwd=tiny.ROOT, text=True,
                          capture_output=True, check=False)


def test_the_catalogue_is_what_the_script_writes():
    done = run("--check")
    assert done.returncode == 0, done.stderr
    text = CATALOGUE.read_text()
    for name in sections.names("rl_jax.recipes"):
        assert f"\n## {name}\n" in text


def test_every_entry_has_all_its_parts():
    for entry in CATALOGUE.read_text().split("\n## ")[1:]:
        assert "Formula: " in entry and "\n- stages: " in entry and "\n- hyper-parameters: " in entry, entry


def test_a_confidence_that_is_none_is_refused():
    with pytest.raises(ValueError, match="verified"):
        recipe.recipe(paper="arXiv:0000.00000", title="A paper", confidence="hopeful")
