"""What compilers make of it: XLA's own program, and lowering for devices that are not there."""
import functools

import contract
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.decode_attention import blocks
from kernels_pallas.decode_attention.op import decode_attention
from kernels_pallas.decode_attention.reference import Cache
from kernels_pallas.prefix_attention.visibility import Options

# Query heads, key heads, head size and options; of Gemma those of the layers that have a window.
MODELS = {
    "Qwen3-0.6B": (16, 8, 128, Options()),
    "Qwen3-4B and Llama-3.1-8B": (32, 8, 128, Options()),
    "Gemma-2-2B": (8, 4, 256, Options(scale=256**-0.5, soft_cap=50.0, window=4096)),
    "Gemma-3-1B": (4, 1, 256, Options(scale=256**-0.5, window=512)),
    "Gemma-3-4B": (8, 4, 256, Options(scale=256**-0.5, window=1024)),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("group, prompts, length, dtype", [
    (8, 4, 1024, jnp.bfloat16), (16, 8, 4096, jnp.bfloat16), (8, 2, 1000, jnp.float32)])
def test_lowers_for_real_models(platform, model, group, prompts, length, dtype):
    heads, key_heads, size, options = MODELS[model]
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)

    def cache(*batch):
        return Cache(*[shape(*batch, key_heads, length, size)] * 2, jax.ShapeDtypeStruct(batch, jnp.int32))

    attend = functools.partial(decode_attention, options=options)
    arrays = shape(group, prompts, heads, size), cache(group, prompts), cache(prompts)
    contract.check_lowering(platform, jax.vmap(attend, in_axes=(0, 0, None)), *arrays)
    if length == 1024:
        contract.check_lowering(platform, jax.value_and_grad(lambda *a: attend(*a).astype(jnp.float32).sum()), *arrays)


@pytest.mark.parametrize("sequences, heads, rows, positions, size", [
    (4, 8, 16, 1024, 128), (64, 8, 2, 4096, 128), (8, 4, 64, 4096, 256), (1, 1, 1, 16, 64), (2, 2, 200, 1000, 128)])
@pytest.mark.parametrize("window", [None, 1, 512])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_blocks_are_what_the_device_takes(platform, window, sequences, heads, rows, positions, size):
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=contract.DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        chosen = blocks.choose(sequences, heads, rows, positions, size, 2, window)
    power_of_two = lambda x: x >= 16 and x & (x - 1) == 0
    assert heads % chosen.heads == 0 and power_of_two(chosen.rows) and chosen.tile <= positions
    if platform == "tpu":
        assert chosen.walk and chosen.splits == 1 and (chosen.tile % 128 == 0 or chosen.tile == positions)
        assert chosen.heads * chosen.tile * size * 2 <= 1 << 20
    else:
        assert not chosen.walk and chosen.heads == 1 and power_of_two(chosen.tile)
        assert chosen.splits == 1 or chosen.splits * chosen.tile <= min(positions, window or positions)


@pytest.mark.parametrize("options", [Options(), Options(soft_cap=1.5, window=100)])
def test_the_cache_that_a_loop_fills_is_not_copied_in_it(options):
    """XLA's own program of a loop that writes a position and attends: no copy of a whole own cache in its body."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    lengths = jnp.full(4, 128)

    def fill(query, key, value, prompt_key, prompt_value):
        def body(carry):
            now, query, key, value = carry
            key, value = (jax.lax.dynamic_update_slice_in_dim(a, query[:, :, :, None], now, 3) for a in (key, value))
            one = lambda q, k, v: decode_attention(
                q, Cache(k, v, jnp.full(4, now + 1)), Cache(prompt_key, prompt_value, lengths), options=options,
                implementation="xla")
            return now + 1, jax.vmap(one)(query, key, value), key, value

        return jax.lax.while_loop(lambda carry: carry[0] < 256, body, (0, query, key, value))[1:]

    own, prompt = shape(3, 4, 2, 256, 16), shape(4, 2, 128, 16)
    lowered = jax.jit(fill, donate_argnums=(1, 2)).lower(shape(3, 4, 2, 16), own, own, prompt, prompt)
    text = lowered.compile({"xla_backend_optimization_level": 3}).as_text()
    assert [line.strip() for line in text.splitlines() if " copy(" in line and "f32[3,4,2,256,16]" in line] == []
