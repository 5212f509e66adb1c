"""One tree in two and back: by pattern, by adapters, and what is refused."""
import jax
import pytest

from rl_jax.models import trainable
from rl_jax.models.lora import Adapters
from rl_jax.models.network import Network
from tests.models import published_shapes

SHAPE = published_shapes.SHAPES["qwen3"]
TREE = jax.eval_shape(Network(SHAPE, Adapters(rank=2, targets="query|up")).initialise, jax.random.key(0))
ADAPTED = {f"blocks/{i}/{name}/adapter_{way}" for i in range(2) for name in ("query", "up") for way in ("in", "out")}
NAMES = set(trainable.names(TREE))


def test_the_names_are_those_of_the_leaves():
    leaves = jax.tree_util.tree_leaves_with_path(TREE)
    assert sorted(NAMES) == sorted("/".join(str(key.key) for key in path) for path, _ in leaves)
    assert "blocks/0/query/weight" in NAMES and "embedding" in NAMES and ADAPTED < NAMES


@pytest.mark.parametrize("train, expected", [
    ("all", NAMES), ("lora", ADAPTED), ("embedding", {"embedding"}),
    ("^blocks/1/", {n for n in NAMES if "blocks/1/" in n}),
    ("blocks/1/(query|key)/weight|final", {"blocks/1/query/weight", "blocks/1/key/weight", "final/scale"}),
    ("norm/scale$", {n for n in NAMES if n.endswith("_norm/scale")}), ("", NAMES)])
def test_what_is_trained_and_what_is_kept_are_the_whole(train, expected):
    trained, kept = trainable.split(TREE, train)
    assert set(trainable.names(trained)) == expected
    assert not kept or set(trainable.names(kept)) == NAMES - expected
    assert bool(kept) == (expected != NAMES)
    both = trainable.joined(trained, kept)
    assert jax.tree.structure(both) == jax.tree.structure(TREE)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, both, TREE)))
    assert jax.tree.structure(trainable.joined(kept, trained)) == jax.tree.structure(TREE)


def test_empty_folders_are_not_kept():
    """They would be nodes of a tree that has no leaves there."""
    trained, kept = trainable.split({"a": {"b": 1}, "c": {"d": {"e": 2}}}, "b$")
    assert trained == {"a": {"b": 1}} and kept == {"c": {"d": {"e": 2}}}


@pytest.mark.parametrize("train, message", [
    ("heads", r"scale.train='heads' trains nothing: no parameter's name has it. Names are \['blocks/0/.* \.\.\."),
    ("blocks/(0", "scale.train='blocks/\\(0' is no regular expression .*give \"all\", \"lora\" or one")])
def test_a_pattern_that_trains_nothing_is_refused(train, message):
    with pytest.raises(ValueError, match=message):
        trainable.split(TREE, train)
    plain = jax.eval_shape(Network(SHAPE).initialise, jax.random.key(0))
    with pytest.raises(ValueError, match="scale.train='lora' trains nothing"):
        trainable.split(plain, "lora")


def test_differentiating_what_is_trained_leaves_the_rest_alone():
    tree = {"a": {"weight": 2.0, "bias": 3.0}, "b": {"weight": 5.0}}
    trained, kept = trainable.split(tree, "a/")

    def loss(trained):
        whole = trainable.joined(trained, kept)
        return whole["a"]["weight"] * whole["b"]["weight"] + whole["a"]["bias"]

    assert jax.grad(loss)(trained) == {"a": {"weight": 5.0, "bias": 1.0}}
