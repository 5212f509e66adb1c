"""Time and memory of the ops of kernels_pallas where this runs: the tables of `benchmark.py kernels`."""
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import benchmark_table
import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.op import decode_attention
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.discounted_scan.op import discounted_scan
from kernels_pallas.linear_logprob.op import linear_logprob
from kernels_pallas.linear_policy_loss.op import linear_policy_loss
from kernels_pallas.linear_policy_loss.reference import Batch, Head
from kernels_pallas.policy_gate.op import policy_gate
from kernels_pallas.prefix_attention.op import prefix_attention
from kernels_pallas.prefix_attention.visibility import Seen
from rl_jax.loss import divergence, gate, ratio

MICROBATCHES = 4
SHORTEST_MEASUREMENT_S = 0.02
Clock = Callable[..., list[float]]  # sides -> median seconds of each, measured in turn
Wanted = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device; axes are those of DESIGN.md.

    Attributes:
      dtype: of hidden states, weights, queries and caches.
      implementations: of every op; None: the one that runs by default.
      square: side of the matrix product that gives the device's rate.
      copied: float32 numbers of the addition that gives the device's rate of copying.
      linear: (M, V, D) of linear_logprob.
      loss: the same of linear_policy_loss, from hidden states to a loss.
      heads: query heads, key heads, head size.
      prefix, decode: (P, G, S, T).
      gate, scan: (N, T).
      memory: rows M, vocabularies V, width D of the table of memory.
    """

    dtype: str
    implementations: tuple[str | None, ...]
    square: int
    copied: int
    linear: tuple[tuple[int, int, int], ...]
    loss: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int, int]
    prefix: tuple[tuple[int, int, int, int], ...]
    decode: tuple[tuple[int, int, int, int], ...]
    gate: tuple[tuple[int, int], ...]
    scan: tuple[tuple[int, int], ...]
    memory: tuple[tuple[int, ...], tuple[int, ...], int]


QWEN3_HEADS = 16, 8, 128  # of Qwen3-0.6B
MEMORY = (512, 2048, 8192), (32768, 151936), 1024
ACCELERATOR = Sizes(
    "bfloat16", (None, "pallas", "xla", "reference"), square=8192, copied=1 << 28, linear=((8192, 151936, 2048),),
    loss=((8192, 151936, 2048),), heads=QWEN3_HEADS, prefix=((4, 8, 1024, 1024), (4, 8, 4096, 1024)),
    decode=((16, 16, 4096, 1024), (16, 16, 4096, 2048), (16, 16, 4096, 4096)), gate=((512, 4096),),
    scan=((512, 4096),), memory=MEMORY)
SIZES = {
    "cpu": Sizes(
        "float32", (None, "reference"), square=2048, copied=1 << 22, linear=((2048, 32768, 1024), (2048, 151936, 1024)),
        loss=((16384, 64, 128), (8192, 1024, 128), (4096, 4096, 256)), heads=QWEN3_HEADS,
        prefix=((2, 4, 128, 128), (2, 4, 512, 128)), decode=((4, 8, 1024, 64), (4, 8, 1024, 256)), gate=((512, 2048),),
        scan=((256, 64), (512, 2048)), memory=MEMORY),
    "gpu": ACCELERATOR,
    "tpu": ACCELERATOR,
}


class Side(NamedTuple):
    """One implementation: function(*arguments) -> arrays."""

    function: Callable[..., Any]
    arguments: tuple


class Case(NamedTuple):
    """One op at one shape.

    Attributes:
      op, shape, dtype: for the table.
      sides: by the name of the implementation.
      bound: which of the device's rates `work` is compared with, "matmul" or "copy".
      work: FLOPs or bytes of the forward pass that no implementation can do without; with the gradient, too (None: the
        gradient is not measured).
      differentiated: arguments by number.
      loss: results -> a number to differentiate.
      target: the most time that the default with its gradient may take, of the reference's.
    """

    op: str
    shape: str
    dtype: str
    sides: dict[str, Side]
    bound: str
    work: tuple[float, float | None]
    differentiated: tuple[int, ...] = ()
    loss: Callable[[Any], Any] = lambda results: sum((x * x).sum() for x in jax.tree.leaves(results)) / 2
    target: float | None = None


def tables(sizes: Sizes, clock: Clock, wanted: Wanted) -> list[benchmark_table.Table]:
    """Times and temporaries of every op, and the memory that linear_logprob does without logits.

    Args:
      sizes: what is measured.
      clock: alternates between the functions that it is given.
      wanted: which rows, by "op shape".
    """
    return [*times(sizes, clock, wanted), *([memory(sizes)] if wanted("linear_logprob memory") else [])]


def times(sizes: Sizes, clock: Clock, wanted: Wanted) -> list[benchmark_table.Table]:
    """Median seconds, the share of the device's rates, and temporaries of the compiled programs."""
    rates, rows, missed = None, [], []
    for case in cases(sizes, wanted):
        rates = rates or measured_rates(sizes, clock)
        for gradient in (False, True)[:1 + (case.work[1] is not None)]:
            new, ratio_to_reference = _measured(case, gradient, rates, clock)
            rows += new
            if gradient and case.target is not None and not ratio_to_reference <= case.target:
                missed.append(f"{case.op} {case.shape}: {ratio_to_reference:.2f}x of the reference's time")
    if rates is None:
        return []
    caption = (f"{benchmark_table.circumstances()}: a product of two [{sizes.square:,}]^2 {sizes.dtype} matrices runs "
               f"at {rates['matmul'] / 1e9:,.0f} GFLOP/s, adding 1 to {sizes.copied:,} float32 numbers at "
               f"{rates['copy'] / 1e9:,.1f} GB/s. Shares are of these rates: FLOPs without recomputation for products, "
               "the bytes of arguments and results for the others.")
    columns = ("op", "shape", "dtype", "implementation", "pass", "ms", "of reference's time", "share of rate",
               "temporaries, MiB")
    return [benchmark_table.Table(caption, columns, tuple(rows), 5, tuple(missed))]


def measured_rates(sizes: Sizes, clock: Clock) -> dict[str, float]:
    """FLOPs per second of a large product, bytes per second read and written by an addition."""
    side = jnp.full((sizes.square, sizes.square), 0.5, sizes.dtype)
    numbers = jnp.zeros((sizes.copied,), jnp.float32)
    product, add = _prepared(lambda x: x @ x, (side,)), _prepared(lambda x: x + 1, (numbers,))
    spent = clock(product.run, add.run)
    return {"matmul": 2 * sizes.square**3 * product.calls / spent[0], "copy": 8 * sizes.copied * add.calls / spent[1]}


class Prepared(NamedTuple):
    """A compiled program: run() makes `calls` calls and waits for them; bytes of its temporaries."""

    run: Callable[[], None]
    calls: int
    temporaries: int


def _prepared(function: Callable[..., Any], arguments: tuple) -> Prepared:
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, min(50, math.ceil(SHORTEST_MEASUREMENT_S / (time.perf_counter() - began))))

    def run():
        for _ in range(calls):
            out = compiled(*arguments)
        jax.block_until_ready(out)

    return Prepared(run, calls, compiled.memory_analysis().temp_size_in_bytes)


def _measured(case: Case, gradient: bool, rates: dict[str, float], clock: Clock) -> tuple[list[tuple], float]:
    """Rows of one pass in every implementation, measured in turn, and the default's time over the reference's."""
    prepared, refused = {}, {}
    for name, side in case.sides.items():
        function = _with_gradient(case, side.function) if gradient else side.function
        try:
            prepared[name] = _prepared(function, side.arguments)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # too large, or cannot run here: the row says so
            refused[name] = str(error).split(":")[0].split("\n")[0]
    spent = clock(*(one.run for one in prepared.values()))
    seconds = {name: total / prepared[name].calls for (name, total) in zip(prepared, spent, strict=True)}
    reference = seconds.get("reference", math.nan)
    head = case.op, case.shape, case.dtype
    direction = "forward and gradient" if gradient else "forward"
    rows = [(*head, name, direction, f"{s * 1e3:,.3f}", f"{s / reference:.2f}x",
             f"{case.work[gradient] / s / rates[case.bound]:.1%}", f"{prepared[name].temporaries / 2**20:,.1f}")
            for name, s in seconds.items()]
    rows += [(*head, name, direction, "", "", why, "") for name, why in refused.items()]
    return rows, seconds.get("default", math.nan) / reference


def _with_gradient(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    def loss(*given):
        results = function(*given)
        return case.loss(results), results

    return jax.grad(loss, case.differentiated, has_aux=True)


def cases(sizes: Sizes, wanted: Wanted) -> Iterator[Case]:
    """Every op at every size, its arrays made when its turn comes."""
    for op, shapes in (
            (_linear_logprob, sizes.linear), (_linear_policy_loss, sizes.loss), (_prefix_attention, sizes.prefix),
            (_decode_attention, sizes.decode), (_policy_gate, sizes.gate), (_discounted_scan, sizes.scan)):
        for shape in shapes:
            if wanted(f"{op.__name__.strip('_')} {_named(op, shape)}"):
                yield op(sizes, *shape)


AXES = {"_linear_logprob": "MVD", "_linear_policy_loss": "MVD", "_prefix_attention": "PGST",
        "_decode_attention": "PGST", "_policy_gate": "NT", "_discounted_scan": "NT"}


def _named(op: Callable, shape: tuple[int, ...]) -> str:
    return " ".join(f"{axis}={size:,}" for axis, size in zip(AXES[op.__name__], shape, strict=True))


def _sides(op: Callable, sizes: Sizes, arguments: tuple) -> dict[str, Side]:
    """The op in every implementation; `op` takes it by keyword."""
    return {name or "default": Side(functools.partial(op, implementation=name), arguments)
            for name in sizes.implementations}


def _normal(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _linear_logprob(sizes: Sizes, m: int, v: int, d: int) -> Case:
    targets = jax.random.randint(jax.random.key(2), (m,), 0, v)
    arguments = _normal(0, (m, d), sizes.dtype), _normal(1, (v, d), sizes.dtype) * d**-0.5, targets
    flops = 2 * m * v * d
    return Case("linear_logprob", _named(_linear_logprob, (m, v, d)), sizes.dtype,
                _sides(linear_logprob, sizes, arguments), "matmul", (flops, 3 * flops), (0, 1), target=1.05)


def _prefix_attention(sizes: Sizes, p: int, g: int, s: int, t: int) -> Case:
    heads, key_heads, size = sizes.heads
    n = p * g

    def arrays(prompts):
        rows = ((n, t, heads), (n, t, key_heads), (n, t, key_heads), (prompts, s, key_heads), (prompts, s, key_heads))
        return tuple(_normal(seed, (*shape, size), sizes.dtype) for seed, shape in enumerate(rows))

    def attend(*given, implementation):
        return prefix_attention(*given, Seen(jnp.full(given[3].shape[:1], s)), implementation=implementation)

    sides = _sides(attend, sizes, arrays(p))
    sides["default, a prompt per row"] = Side(functools.partial(attend, implementation=None), arrays(n))
    flops = 4 * n * heads * size * (t * s + t * (t + 1) // 2)
    return Case("prefix_attention", _named(_prefix_attention, (p, g, s, t)), sizes.dtype, sides, "matmul",
                (flops, 3 * flops), (0, 1, 2, 3, 4))


def _decode_attention(sizes: Sizes, p: int, g: int, s: int, t: int) -> Case:
    heads, key_heads, size = sizes.heads

    def cache(positions, *rows):
        key, value = (_normal(seed, (*rows, key_heads, positions, size), sizes.dtype) for seed in (1, 2))
        return Cache(key, value, jnp.full(rows, positions))

    query = _normal(0, (g, p, heads, size), sizes.dtype)
    sides = _sides(decode_attention, sizes, (query, cache(t, g, p), cache(s, p)))
    sides["default, a prompt per row"] = Side(
        decode_attention, (query.reshape(1, g * p, heads, size), cache(t, 1, g * p), cache(s, g * p)))
    read = 2 * key_heads * size * (p * s + p * g * t) * jnp.dtype(sizes.dtype).itemsize
    return Case("decode_attention", _named(_decode_attention, (p, g, s, t)), sizes.dtype, sides, "copy", (read, None))


def _grpo_gate(policy: dict, given: dict) -> Any:
    r = ratio.per_token(policy["logp"], given["rollout_logp"])
    clipped = gate.ppo_clip(r, given["advantage"], 0.2, 0.28)
    return clipped + 0.04 * divergence.k3(policy["logp"], given["reference_logp"])


def _policy_gate(sizes: Sizes, n: int, t: int) -> Case:
    logp = -jnp.abs(_normal(0, (n, t)))
    given = {name: logp + 0.1 * _normal(seed, (n, t)) for seed, name in ((1, "rollout_logp"), (2, "reference_logp"))}
    given["advantage"] = _normal(3, (n, t))
    mask = jnp.arange(t)[None, :] < jnp.linspace(t // 2, t, n)[:, None]
    share = mask / mask.sum()

    def op(logp, entropy, *rest, implementation):
        return policy_gate(_grpo_gate, {"logp": logp, "entropy": entropy}, *rest, implementation=implementation)

    sides = _sides(op, sizes, (logp, -logp, given, mask, share, share))
    numbers = n * t  # two of the policy, three given, weight and share in float32, a byte of the mask
    return Case("policy_gate", _named(_policy_gate, (n, t)), "float32", sides, "copy",
                (29 * numbers, 33 * numbers), (0,), loss=lambda gated: gated.loss)


def _linear_policy_loss(sizes: Sizes, m: int, v: int, d: int) -> Case:
    logp = -jnp.abs(_normal(0, (1, m)))
    given = {name: logp + 0.1 * _normal(seed, (1, m)) for seed, name in ((1, "rollout_logp"), (2, "reference_logp"))}
    batch = Batch({}, {**given, "advantage": _normal(3, (1, m))}, jnp.ones((1, m), bool), *jnp.full((2, 1, m), 1 / m))
    targets = jax.random.randint(jax.random.key(2), (m,), 0, v)

    def op(hidden, vocabulary, implementation):
        return linear_policy_loss(_grpo_gate, Head(hidden, vocabulary, targets), batch, implementation=implementation)

    arguments = _normal(0, (m, d), sizes.dtype), _normal(1, (v, d), sizes.dtype) * d**-0.5
    sides = _sides(op, sizes, arguments)
    sides |= {name: Side(functools.partial(op, implementation=name), arguments) for name in ("xla", "two_step")}
    flops = 2 * m * v * d
    return Case("linear_policy_loss", _named(_linear_policy_loss, (m, v, d)), sizes.dtype, sides, "matmul",
                (flops, 3 * flops), (0, 1), loss=lambda gated: gated.loss)


def _discounted_scan(sizes: Sizes, n: int, t: int) -> Case:
    sides = _sides(discounted_scan, sizes, (_normal(0, (n, t)), jax.random.uniform(jax.random.key(1), (n, t))))
    numbers = n * t  # x, factor -> y; d_y, factor, y -> d_x, d_factor
    return Case("discounted_scan", _named(_discounted_scan, (n, t)), "float32", sides, "copy",
                (12 * numbers, 32 * numbers), (0, 1))


def memory(sizes: Sizes) -> benchmark_table.Table:
    """Temporaries of linear_logprob's compiled gradient beside those with all logits; nothing runs."""
    rows, (many, vocabularies, d) = [], sizes.memory
    for v in vocabularies:
        for m in many:
            for name, function, batches in (("gradient", _gradient, ()),
                                            (f"scan over {MICROBATCHES} micro-batches", _accumulated, (MICROBATCHES,))):
                given = (jax.ShapeDtypeStruct((*batches, m, d), sizes.dtype), jax.ShapeDtypeStruct((v, d), sizes.dtype),
                         jax.ShapeDtypeStruct((*batches, m), jnp.int32))
                ours, full = (jax.jit(functools.partial(function, implementation)).lower(*given).compile()
                              .memory_analysis().temp_size_in_bytes for implementation in (None, "reference"))
                rows.append((f"{m:,}", f"{v:,}", f"{d:,}", sizes.dtype, name, f"{ours / 2**20:,.1f}",
                             f"{full / 2**20:,.1f}", f"{ours / full:.2%}"))
    caption = ("Temporaries of the compiled gradient of linear_logprob, MiB, from XLA's own analysis. In a scan over "
               "micro-batches of M rows the [V, D] gradient is carried, and is among them.")
    columns = "M", "V", "D", "dtype", "program", "ours", "with all logits", "share"
    return benchmark_table.Table(caption, columns, tuple(rows), words=5)


def _gradient(implementation: str | None, hidden: Any, vocabulary: Any, targets: Any) -> tuple:
    def loss(hidden, vocabulary):
        logp, entropy = linear_logprob(hidden, vocabulary, targets, implementation=implementation)
        return logp.sum() + 0.1 * entropy.sum()

    return jax.grad(loss, (0, 1))(hidden, vocabulary)


def _accumulated(implementation: str | None, hidden: Any, vocabulary: Any, targets: Any) -> tuple:
    def add(total, batch):
        d_hidden, d_vocabulary = _gradient(implementation, batch[0], vocabulary, batch[1])
        return total + d_vocabulary, d_hidden

    return jax.lax.scan(add, jnp.zeros_like(vocabulary), (hidden, targets))
