"""config.json and shape of every published family, there and back; the older forms; and what is refused."""
import dataclasses
import json

import pytest

from rl_jax.models.families import published
from rl_jax.models.mixture import Experts
from rl_jax.models.rotary import Scaling
from tests.models import published_shapes

LLAMA = {"model_type": "llama", "vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 12}
OPTIONS = {"scan_layers": True, "remat": True, "compute": "bfloat16"}


def config(model_type, **fields):
    """A config.json with the fields that have no default."""
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    return {**LLAMA, **(mixture if model_type == "qwen3_moe" else {}), "model_type": model_type, **fields}


def shape(model_type, **fields):
    return published.shape_of(config(model_type, **fields))


@pytest.mark.parametrize("name", published_shapes.SHAPES)
def test_a_shape_is_its_config_s(name):
    """Through JSON, and with what is no property of the checkpoint."""
    wanted = dataclasses.replace(published_shapes.SHAPES[name], **OPTIONS)
    written = json.loads(json.dumps(published.config_of(wanted)))
    assert written["model_type"] == published_shapes.model_type(name)
    assert written["architectures"] == [f"{published.of_config(written).architecture}ForCausalLM"]
    found = published.shape_of(written, **OPTIONS)
    assert found.kinds == wanted.kinds
    assert found.attention_scale == pytest.approx(wanted.attention_scale or 0.5, rel=1e-9) or not found.attention_scale
    plain = {"attention_scale": 0.0, "reach": (), "window": 0}
    assert dataclasses.replace(found, **plain) == dataclasses.replace(wanted, **plain)
    assert published.config_of(found) == written


def test_whole_numbers_are_written_as_such():
    """transformers refuses 24.0 here, and the shape has its inverse root."""
    for name in ("gemma2", "gemma3_text"):
        assert '"query_pre_attn_scalar": 24,' in json.dumps(published.config_of(published_shapes.SHAPES[name]))


FEATURES_OF_NONE = {
    "llama with caps": ("llama", {"logit_cap": 3.0}), "qwen2 with norms": ("qwen2", {"query_norm": True}),
    "windows in some layers of llama": ("llama", {"window": 3, "reach": ("full", "window")}),
    "a scale that is no root": ("gemma2", {"attention_scale": 0.3}),
    "windows in some mixing layers": ("qwen3_moe", {"window": 3, "reach": ("full", "window")}),
    "gelu in qwen3": ("qwen3", {"activation": "gelu_tanh"})}


@pytest.mark.parametrize("case", FEATURES_OF_NONE)
def test_a_shape_of_no_family_is_refused(case):
    name, features = FEATURES_OF_NONE[case]
    with pytest.raises(ValueError, match="no published family has this combination of features.*'gemma2'.*'qwen3_moe'"):
        published.config_of(dataclasses.replace(published_shapes.SHAPES[name], **features))


REFUSED = {
    "unknown family": ("mamba", {}, "model_type='mamba': allowed are .*'gemma2'.*rl_jax/models/families"),
    "no family": (None, {}, "model_type=None: allowed are"),
    "yarn": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
             "rotary scaling of type 'yarn': allowed are default, linear and llama3"),
    "dynamic, older form": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic': allowed are"),
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "'longrope': allowed are"),
    "scaling without factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, "has no field 'factor'"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': allowed is 'silu'"),
    "gelu of qwen": ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu': allowed is 'silu'"),
    "exact gelu": ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu': allowed is 'gelu_pytorch_tanh'"),
    "silu of gemma": ("gemma3_text", {"hidden_act": "silu"}, "hidden_act='silu': allowed is 'gelu_pytorch_tanh'"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias=True: allowed is False"),
    "biases inside": ("llama", {"mlp_bias": True}, "mlp_bias=True: allowed is False"),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, "attention_bias=True: allowed is False"),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "allowed is False .*from left to right"),
    "chunks": ("gemma2", {"layer_types": ["chunked_attention"] * 3, "sliding_window": 3},
               "layer_types has .*chunked_attention.*: allowed are .*full_attention"),
    "no width of the window": ("gemma2", {}, "sliding_window=None, and layers of type sliding_attention need its"),
    "heads": ("llama", {"num_key_value_heads": 3}, "heads=4, key_heads=3: key_heads must divide heads"),
    **{f"no {field}": (family, {field: ...}, rf"\(model_type '{family}'\) has no field '{field}'")
       for family, field in (("llama", "vocab_size"), ("gemma2", "hidden_size"), ("qwen3", "num_hidden_layers"),
                             ("mistral", "num_attention_heads"), ("qwen2", "intermediate_size"),
                             ("qwen3_moe", "moe_intermediate_size"), ("qwen3_moe", "num_experts_per_tok"))},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused_with_its_name(case):
    family, fields, message = REFUSED[case]
    given = {name: value for name, value in config(family, **fields).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        published.shape_of(given)


def test_fields_that_are_left_out_are_those_of_every_family():
    found = shape("llama")
    assert (found.key_heads, found.head_size, found.tied, found.norm_epsilon) == (4, 2, False, 1e-6)
    assert (found.rotary_base, found.rotary_scaling, found.window, found.mixture) == (10_000.0, None, 0, None)
    assert shape("llama", tie_word_embeddings=True, head_dim=6, num_key_value_heads=2, rms_norm_eps=1e-5) == (
        dataclasses.replace(found, tied=True, head_size=6, key_heads=2, norm_epsilon=1e-5))
    assert [shape(name, sliding_window=3).head_size for name in ("qwen3", "qwen3_moe", "gemma2")] == [128, 2, 256]


@pytest.mark.parametrize("rope, base, scaling", [
    ({}, 10_000.0, None), ({"rope_theta": 5e5}, 5e5, None), ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5, None),
    ({"rope_theta": 1e3, "rope_scaling": {"type": "linear", "factor": 2}}, 1e3, Scaling(kind="linear", factor=2.0)),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}}, 1e3,
     Scaling(kind="linear", factor=2.0)),
    ({"rope_theta": 5e5, "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.5, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}}, 5e5, Scaling(kind="llama3", factor=8.0, low=1.5, high=4.0, original_length=8192))])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral"])
def test_rotary_settings_in_every_form(family, rope, base, scaling):
    found = shape(family, **rope)
    assert (found.rotary_base, found.rotary_scaling) == (base, scaling)


def test_mistral_with_and_without_a_window():
    """The field is 4,096 where config.json leaves it out; null is no window."""
    assert shape("mistral", sliding_window=None).kinds == shape("llama").kinds
    assert [kind.window for kind in shape("mistral", sliding_window=9).kinds] == [9, 9, 9]
    assert [kind.window for kind in shape("mistral").kinds] == [4096] * 3


def windows(*given, **fields):
    return [kind.window for kind in shape(*given, **fields).kinds]


def test_qwen_s_windows_begin_at_a_layer_and_must_be_switched_on():
    assert windows("qwen2", sliding_window=5, max_window_layers=1) == [None] * 3
    assert windows("qwen2", sliding_window=5, max_window_layers=1, use_sliding_window=True) == [None, 5, 5]
    assert windows("qwen3", sliding_window=5, use_sliding_window=True) == [None] * 3  # from layer 28 on
    assert windows("qwen3", sliding_window=5, layer_types=["sliding_attention", "full_attention", "full_attention"],
                   use_sliding_window=True) == [5, None, None]
    assert windows("qwen3_moe", sliding_window=5, max_window_layers=1, use_sliding_window=True) == [5] * 3
    assert windows("qwen3_moe", sliding_window=5) == [None] * 3


def test_gemma_without_layer_types():
    """Gemma 2: every other layer, the first one windowed; Gemma 3: all but every sixth, or as the pattern says."""
    assert windows("gemma2", sliding_window=3) == [3, None, 3]
    deep = {"sliding_window": 3, "num_hidden_layers": 7}
    assert windows("gemma3_text", **deep) == [3, 3, 3, 3, 3, None, 3]
    assert windows("gemma3_text", **deep, sliding_window_pattern=3) == [3, 3, None, 3, 3, None, 3]
    assert windows("gemma3_text", **deep, _sliding_window_pattern=2) == [3, None, 3, None, 3, None, 3]
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows("gemma3_text", sliding_window=3, layer_types=kinds) == [None, 3, None]
    assert windows("gemma2", sliding_window=3, layer_types=kinds) == [None, 3, None]


def test_gemma_s_numbers():
    """The caps of Gemma 2 are 50 and 30 where config.json leaves them out; null is none."""
    found = shape("gemma2", sliding_window=3, head_dim=16)
    assert (found.attention_cap, found.logit_cap, found.attention_scale, found.tied) == (50.0, 30.0, 1 / 16, True)
    assert (found.norm_offset, found.after_norms, found.scale_embedding) == (1.0, True, True)
    assert found.activation == "gelu_tanh"
    given = {"attn_logit_softcapping": None, "final_logit_softcapping": 2, "query_pre_attn_scalar": 4}
    found = shape("gemma2", sliding_window=3, **given)
    assert (found.attention_cap, found.logit_cap, found.attention_scale) == (0.0, 2.0, 0.5)
    found = shape("gemma3_text", sliding_window=3, tie_word_embeddings=False)
    assert (found.attention_cap, found.logit_cap, found.query_norm, found.tied) == (0.0, 0.0, True, False)


@pytest.mark.parametrize("rope, near, far, scaling", [
    ({}, 1e4, 1e6, None), ({"rope_theta": 5e3}, 1e4, 5e3, None),
    ({"rope_theta": 5e3, "rope_local_base_freq": 70.0}, 70.0, 5e3, None),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 1e4, 1e6, Scaling(kind="linear", factor=8.0)),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 80.0}}}, 80.0, 9e5,
     Scaling(kind="linear", factor=8.0))])
def test_gemma3_s_layers_have_wavelengths_of_their_own(rope, near, far, scaling):
    """The scaling is of those that see all."""
    found = shape("gemma3_text", sliding_window=3, sliding_window_pattern=2, **rope)
    kinds = [(kind.rotary_base, kind.rotary_scaling) for kind in found.kinds]
    assert kinds == [(near, None), (far, scaling), (near, None)]


def test_which_layers_mix_and_how():
    """`decoder_sparse_step` counts layers from 1; `mlp_only_layers` numbers them from 0."""
    def mixing(**fields):
        return [kind.mixture for kind in shape("qwen3_moe", num_hidden_layers=4, **fields).kinds]

    assert mixing() == [True] * 4
    assert mixing(mlp_only_layers=[0, 3]) == [False, True, True, False]
    assert mixing(decoder_sparse_step=2) == [False, True, False, True]
    assert mixing(decoder_sparse_step=2, mlp_only_layers=[1]) == [False, False, False, True]
    assert shape("qwen3_moe").mixture == Experts(experts=4, chosen=2, inner=6, normalised=False)
    assert shape("qwen3_moe", norm_topk_prob=True).mixture.normalised
    assert shape("qwen3_moe", num_experts=None, num_local_experts=8).mixture.experts == 8  # the newer name
