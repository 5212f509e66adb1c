"""Random checkpoints of every family, in other sizes than the golden ones, as transformers has them and as we do."""
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models import pretrained

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

import make_golden_checkpoints as golden  # noqa: E402  (scripts are no package)

SIZES = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 40}
FULL, WINDOW = "full_attention", "sliding_attention"
CASES = {
    "qwen2": ("qwen2", {**golden.base(1_000_000.0), "tie_word_embeddings": False}),
    "qwen2, upper layers windowed": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True,
                                               "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 10, "num_hidden_layers": 4, "decoder_sparse_step": 2, "num_experts": 5,
                                "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": False,
                                "tie_word_embeddings": True}),
    "llama": ("llama", {"rope_parameters": LLAMA3, "head_dim": 14, "tie_word_embeddings": False}),
    "llama, linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
                                        "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 13, "tie_word_embeddings": True}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 7, "num_hidden_layers": 3,
                          "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": ("gemma3_text", {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20,
                                    "num_hidden_layers": 4, "layer_types": [WINDOW, WINDOW, FULL, WINDOW],
                                    "rope_parameters": {WINDOW: {"rope_type": "default", "rope_theta": 50.0},
                                                        FULL: {"rope_type": "default", "rope_theta": 20_000.0}}}),
}
SEED = 7


@dataclasses.dataclass(frozen=True)
class Pair:
    """One checkpoint.

    Attributes:
      theirs: transformers' model, float32, eager attention.
      ours: the policy loaded from the folder.
      folder: that transformers saved.
      tokens: [3, 50] to ask both about.
      logits: theirs.
    """

    theirs: Any
    ours: pretrained.Policy
    folder: pathlib.Path
    tokens: np.ndarray
    logits: np.ndarray


def make(case: str, folder: pathlib.Path) -> Pair:
    """The checkpoint of a case, saved and loaded."""
    model_type, settings = CASES[case]
    theirs = golden.build(model_type, {**SIZES, **settings}, SEED)
    golden.save(theirs, folder)
    tokens = np.random.default_rng(SEED).integers(1, SIZES["vocab_size"], (3, 50)).astype(np.int32)
    return Pair(theirs, pretrained.load(folder), folder, tokens, golden.logits_of(theirs, tokens))


def reread(folder: pathlib.Path) -> Any:
    """transformers' model of a folder, in float32 whatever the file holds."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def our_logits(policy: pretrained.Policy, tokens: np.ndarray) -> np.ndarray:
    """[B, L, V] as NumPy."""
    return np.asarray(jax.jit(policy.logits)(jnp.asarray(tokens)))
