"""What the README shows is what there is."""
import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def test_the_recipe_shown_is_the_recipe_shipped():
    shipped = (ROOT / "rl_jax/recipes/loss/dapo_decoupled_clip.py").read_text()
    assert _without_docstrings(BLOCKS[0]) == _without_docstrings(shipped)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_one_liner_prints_the_gradient_of_a_gate():
    """Inside the band the gradient is -A = -+1 / sqrt 2, outside on the side that A pushes to it is 0."""
    line, = re.findall(r"^python -c .*$", README, re.MULTILINE)
    done = subprocess.run(shlex.split(line.replace("python", sys.executable, 1)), cwd=ROOT, text=True, capture_output=True,
                          check=True)
    numbers = [float(one) for one in re.findall(r"-?\d+\.\d*", done.stdout)]
    assert numbers == pytest.approx([-0.7071, 0.0, 0.7071, 0.0], abs=1e-4)


def test_every_file_it_names_exists():
    named = re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"`((?:tests|configs|scripts)/[\w./]+)`", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
