"""What DESIGN.md and STYLE.md ask of every file, read from the sources."""
import ast
import dataclasses
import functools
import pathlib
import re
import sys
import tomllib

import pytest

from rl_jax.recipe import Recipe
from tests import conftest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ("rollout", "reward", "selection", "advantage", "loss", "weighting", "schedule")
PURE_STAGES = tuple(stage for stage in STAGES if stage != "rollout")
KERNEL_FILES = ("op.py", "reference.py", "forward.py", "backward.py", "blocks.py")
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base", "lib"}

# Who may import which modules of this repository, by the longest prefix that fits; a name covers what is under it.
LEARNER = ("rl_jax.batching", "rl_jax.learner", "rl_jax.models", "rl_jax.rollout", "rl_jax.recipe", "rl_jax.types", "rl_jax.masked",
           "kernels_pallas")
MAY_IMPORT = {
    "kernels_pallas": ("kernels_pallas",),
    "rl_jax.record": (),
    "rl_jax.types": ("rl_jax.record",),
    "rl_jax.masked": ("rl_jax.types",),
    "rl_jax.recipe": (),
    **{f"rl_jax.{stage}": ("rl_jax.masked", "rl_jax.types", "kernels_pallas", f"rl_jax.{stage}")
       for stage in PURE_STAGES},
    "rl_jax.rollout": ("rl_jax.rollout", "rl_jax.models", "rl_jax.recipe", "rl_jax.record", "rl_jax.types",
                       "kernels_pallas"),
    "rl_jax.models": ("rl_jax.hub", "rl_jax.models", "rl_jax.types", "kernels_pallas"),
    "rl_jax.learner": LEARNER,
    "rl_jax.learner.step": (*LEARNER, "rl_jax.tasks.judge", "rl_jax.tasks.task"),  # make_step takes a whole task
    "rl_jax.recipes": ("rl_jax.recipe", "rl_jax.masked", "rl_jax.rollout.perturb",
                       *(f"rl_jax.{stage}" for stage in PURE_STAGES)),
    "rl_jax.hub": (),
    "rl_jax.ahead": ("rl_jax.models.mesh",),
    "rl_jax.batching": (),
    "rl_jax.tasks": ("rl_jax.hub", "rl_jax.tasks", "rl_jax.reward", "rl_jax.types"),
    "rl_jax.models.pretrained": ("rl_jax.models", "rl_jax.types", "rl_jax.hub", "rl_jax.tasks.checkpoint_tokenizer"),
    "rl_jax.sections": (),
    "rl_jax.experiment": ("rl_jax.ahead", "rl_jax.batching", "rl_jax.learner.optimiser", "rl_jax.models", "rl_jax.recipe", "rl_jax.hub", "rl_jax.sections",
                          "rl_jax.tasks.task", "rl_jax.tasks.checkpoint_tokenizer"),
    "rl_jax.comparison": ("rl_jax.experiment", "rl_jax.learner.optimiser", "rl_jax.models.shape", "rl_jax.recipe",
                          "rl_jax.sections", "rl_jax.tasks.task"),
    "rl_jax.train": ("rl_jax.ahead", "rl_jax.batching", "rl_jax.comparison", "rl_jax.sections", "rl_jax.hub",
                     "rl_jax.train", "rl_jax.experiment", "rl_jax.learner", "rl_jax.models", "rl_jax.rollout",
                     "rl_jax.tasks", "rl_jax.reward.worker", "rl_jax.recipe", "rl_jax.types", "kernels_pallas"),
    "configs": ("configs", "rl_jax.comparison", "rl_jax.experiment", "rl_jax.sections", "rl_jax.recipes", "rl_jax.tasks", "rl_jax.models"),
    "scripts": ("rl_jax", "kernels_pallas", "configs"),
}

# Names that are read by getattr or hasattr with good reason: a field whose name is data.
MAY_READ_BY_NAME = {"rl_jax/record.py", "rl_jax/recipe.py", "rl_jax/models/transformer.py",
                    "rl_jax/learner/optimiser.py", "rl_jax/train/checkpoint.py"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One file: its path from the root, its module's name, its text and syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is an __init__.py."""
        return self.path.endswith("__init__.py")


def read(path: pathlib.Path) -> Source:
    relative = path.relative_to(ROOT)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text()
    return Source(str(relative), module, text, ast.parse(text))


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    found = tuple(read(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    assert found, f"nothing in {folders}"
    return found


def package() -> tuple[Source, ...]:
    return sources("rl_jax", "kernels_pallas")


def modules() -> tuple[Source, ...]:
    return sources("rl_jax", "kernels_pallas", "configs", "scripts")


def by_path(source: Source) -> str:
    return source.path


def imported(source: Source) -> set[str]:
    """Full names of what a file imports anywhere; `from a import b` gives a.b where that is a module, else a."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if is_module(full) else node.module)
    return names


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def covered(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def public(tree: ast.Module):
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (inner for inner in node.body
                            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"))


@pytest.mark.parametrize("source", modules(), ids=by_path)
def test_imports_follow_the_table(source):
    owner = max((prefix for prefix in MAY_IMPORT if covered(source.module, (prefix,))), key=len, default=None)
    own = {name for name in imported(source) if name.split(".")[0] in ("rl_jax", "kernels_pallas", "configs", "tests",
                                                                       "scripts")}
    if owner is None:
        assert source.is_package and not own, f"{source.path} is in no row of the import table"
        return
    forbidden = sorted(name for name in own if not covered(name, MAY_IMPORT[owner]))
    assert not forbidden, f"{source.path} imports {forbidden}; {owner} may import {MAY_IMPORT[owner]}"


@pytest.mark.parametrize("source", [s for s in sources("rl_jax/recipes") if not s.is_package], ids=by_path)
def test_a_recipe_is_one_factory_of_slots(source):
    names = imported(source)
    outside = {name for name in names if not name.startswith("rl_jax.")}
    assert outside <= {"collections.abc", "typing"}, f"{source.path} imports {outside}: recipes do no arithmetic"
    decorated = [node.name for node in source.tree.body if isinstance(node, ast.FunctionDef) and any(
        isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "recipe"
        for d in node.decorator_list)]
    assert decorated == [pathlib.Path(source.path).stem], f"{source.path} must hold one @recipe of its own name"


def test_recipe_names_are_unique_ignoring_case():
    names = [pathlib.Path(s.path).stem.lower() for s in sources("rl_jax/recipes") if not s.is_package]
    assert len(set(names)) == len(names)


def test_every_stage_field_has_a_folder():
    fields = [field.name for field in dataclasses.fields(Recipe)]
    assert set(STAGES) <= set(fields)
    assert [field for field in fields if field in STAGES] == list(STAGES), "slots stand in the order data meets them"
    assert [stage for stage in STAGES if not (ROOT / "rl_jax" / stage / "__init__.py").exists()] == []


def test_stages_import_little_from_outside():
    """So that a stage can be lifted into another codebase; the reward's worker pool is plain Python."""
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "jaxtyping"}
    extra = {"rl_jax/reward/worker.py": {"absl", "cloudpickle", "pebble"}, "rl_jax/reward/numeric.py": {"math_verify"}}
    for source in sources(*(f"rl_jax/{stage}" for stage in PURE_STAGES)):
        outside = {name.split(".")[0] for name in imported(source)} - {"rl_jax", "kernels_pallas"}
        assert outside <= allowed | extra.get(source.path, set()), f"{source.path} imports {outside - allowed}"


@pytest.mark.parametrize("source", modules(), ids=by_path)
def test_sizes_stay_under_their_ceilings(source):
    kernel = source.path.startswith("kernels_pallas/")
    lines = source.text.count("\n")
    assert lines <= (500 if kernel else 400), f"{source.path} has {lines} lines: split it by concept"
    for node in functions(source.tree):
        where = f"{source.path}:{node.lineno} {node.name}"
        start = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        body = node.end_lineno - start[0].lineno + 1
        assert body <= (100 if kernel else 60), f"{where} has a body of {body} lines"
        positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        recipe = source.path.startswith("rl_jax/recipes/")  # a factory's hyperparameters are the paper's
        references = kernel and node.name.endswith("_body")  # Pallas gives a kernel's body a reference per array
        assert recipe or references or len(positional) <= 7, f"{where} has {len(positional)} positional parameters"


@pytest.mark.parametrize("source", modules(), ids=by_path)
def test_functions_nest_at_most_two_deep(source):
    def depth(node):
        inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, ast.FunctionDef)

    deepest = max((depth(node) for node in functions(source.tree)), default=0)
    assert deepest <= 3, f"{source.path} nests functions {deepest - 1} deep"


@pytest.mark.parametrize("source", package(), ids=by_path)
def test_what_is_public_is_annotated_and_documented(source):
    assert source.is_package or ast.get_docstring(source.tree), f"{source.path} has no docstring"
    for node in public(source.tree):
        where = f"{source.path}:{node.lineno} {node.name}"
        docstring = ast.get_docstring(node)
        assert docstring, f"{where} has no docstring"
        assert not docstring.startswith("Computes"), f"{where}: say what it is, not that it computes it"
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{where}: {bare} have no annotation"
            assert node.returns is not None or node.name == "__init__", f"{where}: what does it return?"


@pytest.mark.parametrize("folder", sorted(
    path for path in (ROOT / "kernels_pallas").iterdir() if (path / "__init__.py").exists()), ids=lambda p: p.name)
def test_kernel_folders_are_complete(folder):
    assert [name for name in KERNEL_FILES if not (folder / name).exists()] == []
    assert (ROOT / "tests" / "kernels_pallas" / f"test_{folder.name}.py").exists()


@pytest.mark.parametrize("source", modules(), ids=by_path)
def test_nothing_hides(source):
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    by_name = [f"{source.path}:{node.lineno}" for node in calls if node.func.id in ("getattr", "hasattr", "setattr")]
    assert not by_name or source.path in MAY_READ_BY_NAME, by_name
    assert pathlib.Path(source.path).stem not in VAGUE, f"{source.path}: name it for the noun it gives"
    assert not VAGUE & set(pathlib.Path(source.path).parent.parts), source.path
    assert "__future__" not in imported(source), f"{source.path}: it defeats the shape checks"
    todo = re.search(r"#\s*(TODO|FIXME|XXX|HACK)", source.text)
    assert not todo, f"{source.path}: {todo}"
    if source.is_package:
        assert not source.text.strip(), f"{source.path}: packages are empty, modules are imported by name"


@pytest.mark.parametrize("source", sources("tests"), ids=by_path)
def test_no_test_skips(source):
    skips = [f"{source.path}:{node.lineno}" for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)
             and node.attr in ("skip", "skipif", "xfail", "importorskip")]
    assert not skips, f"marks gpu, tpu and slow choose what runs; nothing else skips: {skips}"
    assert "__future__" not in imported(source)


@pytest.mark.parametrize("prefix", conftest.SLOW)
def test_what_is_marked_slow_exists(prefix):
    path, _, rest = prefix.partition("::")
    assert f"def {rest.partition('[')[0] or 'test_'}" in (ROOT / path).read_text()


def test_no_function_has_a_boolean_that_switches_algorithms():
    """Only records of plain numbers (the network's shape) hold booleans; stages and kernels have none."""
    for source in sources(*(f"rl_jax/{stage}" for stage in PURE_STAGES), "kernels_pallas"):
        for node in public(source.tree):
            if isinstance(node, ast.FunctionDef):
                flags = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)
                         if isinstance(a.annotation, ast.Name) and a.annotation.id == "bool"]
                assert not flags, f"{source.path}:{node.lineno} {node.name}: {flags}; write two functions"


def test_base_dependencies_install_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [one for one in project["dependencies"] if "[" in one or "cuda" in one or "tpu" in one] == []
    assert {"gpu", "tpu", "tasks", "hf", "log", "dev"} <= set(project["optional-dependencies"])
    assert any(one.startswith("jax>=") for one in project["dependencies"])


def test_what_is_imported_is_declared():
    """A module-level import of a base module comes from a base dependency; extras are imported inside functions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {re.split(r"[\[<>=~! ]", one)[0] for one in project["dependencies"]}
    provided = {"absl-py": "absl", "ml-collections": "ml_collections", "orbax-checkpoint": "orbax"}
    allowed = {provided.get(one, one.replace("-", "_")) for one in distributions}
    allowed |= {*sys.stdlib_module_names, "rl_jax", "kernels_pallas"}
    for source in package():
        top = ast.Module(body=[n for n in source.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))],
                         type_ignores=[])
        outside = {name.split(".")[0] for name in imported(dataclasses.replace(source, tree=top))} - allowed
        assert not outside, f"{source.path} imports {outside} at its top; base dependencies are {sorted(distributions)}"
