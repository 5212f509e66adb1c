"""The network again, one whole text at a time and one head at a time: what every entry point is compared with."""
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models.shape import Shape


def rms(xp, x, scale, epsilon):
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale[None, :]


def turned(xp, x, base):
    """Each row of x [L, E] turned to its position: the pair (x_i, x_{i + E/2}) as one complex number."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)[None, :]
    cosine, sine = np.cos(angle), np.sin(angle)
    left, right = x[:, :half], x[:, half:]
    return xp.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=1)


def head(xp, query, key, value):
    """Causal softmax attention of one head, [L, E] each."""
    score = query @ key.T / np.sqrt(query.shape[1])
    score = xp.where(np.tril(np.ones(score.shape, bool)), score, -np.inf)
    weight = xp.exp(score - score.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True) @ value


def layer(xp, shape: Shape, block, x):
    def linear(name, y):
        y = y @ block[name]["weight"]
        return y + block[name]["bias"][None, :] if "bias" in block[name] else y

    def split(name, y):
        return xp.split(linear(name, y), linear(name, y).shape[1] // shape.head_size, axis=1)

    y = rms(xp, x, block["before_attention"]["scale"], shape.norm_epsilon)
    query, key, value = (split(name, y) for name in ("query", "key", "value"))
    if shape.query_norm:
        query = [rms(xp, q, block["query_norm"]["scale"], shape.norm_epsilon) for q in query]
        key = [rms(xp, k, block["key_norm"]["scale"], shape.norm_epsilon) for k in key]
    query, key = ([turned(xp, a, shape.rotary_base) for a in heads] for heads in (query, key))
    shared_by = shape.heads // shape.key_heads
    mixed = [head(xp, q, key[i // shared_by], value[i // shared_by]) for i, q in enumerate(query)]
    x = x + linear("out", xp.concatenate(mixed, axis=1))
    y = rms(xp, x, block["before_inner"]["scale"], shape.norm_epsilon)
    gate = linear("gate", y)
    return x + linear("down", gate / (1 + xp.exp(-gate)) * linear("up", y))


def hidden(shape: Shape, parameters, tokens, xp=np):
    """Hidden states [L, D] of one text; xp is numpy (float64) or jax.numpy (to differentiate)."""
    x = parameters["embedding"][tokens] * (shape.width**0.5 if shape.scale_embedding else 1.0)
    for block in unrolled(parameters)["blocks"].values():
        x = layer(xp, shape, block, x)
    return rms(xp, x, parameters["final"]["scale"], shape.norm_epsilon)


def logp(shape: Shape, parameters, prompt, completion, xp=np, temperature=1.0):
    """Log-probability of every token of the vocabulary at each position of the completion, [T, V]."""
    tokens = xp.concatenate([prompt, completion])
    matrix = parameters["embedding"] if shape.tied else parameters["head"]
    states = hidden(shape, parameters, tokens, xp)[len(prompt) - 1:len(tokens) - 1]
    logits = states @ matrix.T / temperature
    top = logits.max(axis=1, keepdims=True)
    return logits - top - xp.log(xp.exp(logits - top).sum(axis=1, keepdims=True))


def float64(parameters):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), parameters)


def unrolled(parameters):
    """Parameters with a block per layer, whether the layers (all of one kind) were scanned or not."""
    blocks = parameters["blocks"]
    if blocks[0]["query"]["weight"].ndim == 3:
        count = len(blocks[0]["query"]["weight"])
        blocks = {i: jax.tree.map(lambda a, i=i: a[i], blocks[0]) for i in range(count)}
    return {**parameters, "blocks": blocks}


def scanned(parameters):
    """Parameters with the layers, all of one kind, stacked."""
    blocks = parameters["blocks"]
    return {**parameters, "blocks": {0: jax.tree.map(lambda *a: jnp.stack(a), *(blocks[i] for i in sorted(blocks)))}}


def perturbed(parameters, seed=0):
    """Parameters with noise on every number: biases that are not 0, scales that are not 1."""
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
