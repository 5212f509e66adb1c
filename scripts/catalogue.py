"""Writes rl_jax/recipes/CATALOGUE.md from the recipes themselves.

python scripts/catalogue.py            writes it
python scripts/catalogue.py --check    exits with 1 if it is not what would be written
"""
import ast
import importlib
import inspect
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PATH = ROOT / "rl_jax/recipes/CATALOGUE.md"
STAGES = ("rollout", "reward", "selection", "advantage", "loss", "weighting", "schedule")
CONFIDENCE = {"verified": "published code or the paper's text was read",
              "secondary": "somebody else's implementation was read",
              "reconstructed": "built from the abstract; untuned and to be checked before it is relied on"}
_CHECK = flags.DEFINE_bool("check", False, "Compare with the file instead of writing it.")


def text() -> str:
    """The whole catalogue as Markdown."""
    from rl_jax import sections

    names = sections.names("rl_jax.recipes")
    found = {name: vars(importlib.import_module(f"rl_jax.recipes.{name}"))[name.rsplit(".", 1)[-1]] for name in names}
    counts = {word: sum(factory.card.confidence == word for factory in found.values()) for word in CONFIDENCE}
    kinds = "\n".join(f"- **{word}** ({counts[word]}): {meaning}." for word, meaning in CONFIDENCE.items())
    return "\n".join([
        "# Catalogue of recipes", "",
        f"{len(names)} recipes. `python scripts/catalogue.py` writes this file from their sources; a test compares them.",
        "A name is what a config takes: `--config=configs/toys/addmod.py:loss.gspo`. How well a formula is known:", "",
        kinds, "",
        "| recipe | definition | formula |", "|---|---|---|",
        *(f"| [`{name}`](#{_anchor(name)}) | {_cell(_definition(factory))} | {factory.card.confidence} |"
          for name, factory in found.items()),
        "", *(_entry(name, factory) for name, factory in found.items())])


def _entry(name: str, factory: Callable) -> str:
    card = factory.card
    lines = [f"## {name}", "", f"{card.title} ({_link(card.paper)}). Formula: {card.confidence}.", "",
             _definition(factory), "",
             f"- stages: {_stages(name, factory)}", f"- hyper-parameters: {_parameters(factory)}"]
    if card.note:
        lines.append(f"- note: {card.note}")
    return "\n".join([*lines, ""])


def _definition(factory: Callable) -> str:
    """The first paragraph of the factory's docstring."""
    return " ".join(inspect.getdoc(factory).split("\n\n")[0].split())


def _parameters(factory: Callable) -> str:
    shown = (f"`{name}={p.default!r}`" for name, p in inspect.signature(factory).parameters.items())
    return ", ".join(shown) or "none"


def _stages(name: str, factory: Callable) -> str:
    """The stage modules that the recipe's file imports, and what is unusual in its rollout, schedule and models."""
    tree = ast.parse((ROOT / "rl_jax/recipes" / f"{name.replace('.', '/')}.py").read_text())
    used: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.removeprefix("rl_jax.") in used:
            used[node.module.removeprefix("rl_jax.")] |= {alias.name for alias in node.names}
    recipe = factory()
    for stage, default, leave in (("rollout", type(recipe.rollout), ("group_size", "group_size_at_least")),
                                  ("schedule", type(recipe.schedule), ())):
        value = vars(recipe)[stage]
        if value is not None:
            used[stage] |= {f for f, v in vars(value).items() if f not in leave and v != vars(default())[f]}
    stages = [f"{stage} ({', '.join(sorted(parts))})" for stage, parts in used.items() if parts]
    models = [f"models ({', '.join(recipe.models)})"] if recipe.models else []
    return "; ".join([*stages, *models])


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def _anchor(name: str) -> str:
    return name.replace(".", "")


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def main(_: list[str]) -> None:
    """Writes or checks the catalogue."""
    written = text()
    if not _CHECK.value:
        PATH.write_text(written)
    elif not PATH.exists() or PATH.read_text() != written:
        sys.exit(f"{PATH.relative_to(ROOT)} is not what the recipes say: run python scripts/catalogue.py")


if __name__ == "__main__":
    app.run(main)
