"""Tiny random checkpoints and what `transformers` and `peft` say about them: tests/models/golden/.

Command: python scripts/make_golden_checkpoints.py --folder=tests/models/golden
Needs: pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 (scripts/test_parity.sh makes such an environment);
from the repository's root, about 20 seconds on one CPU core. The same versions give the same checkpoints bit for bit,
and the same expected numbers but for another processor's rounding. That each feature moves the logits is asserted.
"""
import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np
from absl import app, flags

FOLDER = flags.DEFINE_string("folder", "tests/models/golden", "Where the folder of each checkpoint is written.")

TEXTS, LENGTH, PROMPT, GREEDY = 2, 40, 6, 64
SMALLEST_MARGIN = 1e-2  # between the first and the second logit at every greedy step
SMALLEST_MOVE = 1e-2  # of some logit, when a feature is switched off
SMALLEST_MOVES = {"tanh": 1e-3}  # the two GELUs differ by less than 5e-4
FEWEST_TOKENS = 6  # different ones in a greedy answer
MOST_BYTES = 250_000  # in a folder
SIZES = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
         "bos_token_id": 2, "eos_token_id": 3, "rms_norm_eps": 0.02}
# Of a head's eight wavelengths the shortest is kept, the second lies between the bounds, the others are stretched.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
GLOBAL = {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 4.0}


def base(theta: float) -> dict[str, Any]:
    """Rotary settings without scaling."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One checkpoint.

    Attributes:
      seed: of weights and texts; chosen such that greedy decoding is nowhere close to a tie.
      settings: of the configuration, beside SIZES.
      stops: end tokens in generation_config.json; None: the configuration's.
      dtype: that the weights are stored in.
      shard: the largest file.
      without: features, each with the settings that switch it off.
      neutral: features, each with the parameters (a pattern) and the value that make them do nothing.
    """

    seed: int
    settings: dict[str, Any]
    stops: list[int] | None = None
    dtype: str = "float32"
    shard: str = "5GB"
    without: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    neutral: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)


EVERY = {"epsilon": {"rms_norm_eps": 1e-6}}
QUERY_NORM = {"query and key norms": (r"[qk]_norm\.weight$", 1.0)}
GEMMA = {"scale of the embedding": (r"embed_scale$", 1.0), "norms after": (r"post_\w+norm\.weight$", 0.0)}
FAMILIES = {
    "qwen2": Family(
        seed=172, settings={**base(5_000.0), "tie_word_embeddings": True},
        without={**EVERY, "rotary base": base(10_000.0)}, neutral={"biases": (r"\.bias$", 0.0)}),
    "qwen3": Family(
        seed=68, settings={**base(5_000.0), "head_dim": 16, "tie_word_embeddings": False}, shard="40KB",
        without={**EVERY, "rotary base": base(10_000.0)}, neutral=QUERY_NORM),
    "qwen3_moe": Family(
        seed=71, settings={**base(5_000.0), "head_dim": 16, "num_hidden_layers": 3, "mlp_only_layers": [1],
                          "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2,
                          "norm_topk_prob": True, "tie_word_embeddings": False}, dtype="bfloat16",
        without={**EVERY, "normalised weights": {"norm_topk_prob": False}, "second expert": {"num_experts_per_tok": 1}},
        neutral={**QUERY_NORM, "router": (r"mlp\.gate\.weight$", 0.0)}),
    "llama": Family(
        seed=105, settings={"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
        dtype="bfloat16", stops=[3, 7],
        without={**EVERY, "rotary scaling": base(100.0),
                 "rotary factor": {"rope_parameters": {**LLAMA3, "factor": 2.0}},
                 "upper bound": {"rope_parameters": {**LLAMA3, "high_freq_factor": 4.0}},
                 "lower bound": {"rope_parameters": {**LLAMA3, "low_freq_factor": 0.5}}}),
    "mistral": Family(
        seed=24, settings={**base(10_000.0), "sliding_window": 8, "tie_word_embeddings": False},
        without={**EVERY, "window": {"sliding_window": 1_000}, "window's exact length": {"sliding_window": 9}}),
    "gemma2": Family(
        seed=97, settings={**base(5_000.0), "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8,
                          "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
                          "intermediate_size": 40},
        without={**EVERY, "window": {"sliding_window": 1_000}, "cap of the scores": {"attn_logit_softcapping": None},
                 "cap of the logits": {"final_logit_softcapping": None}, "scale": {"query_pre_attn_scalar": 16},
                 "order of the layers": {"layer_types": ["full_attention", "sliding_attention"] * 2},
                 "tanh": {"hidden_activation": "gelu"}}, neutral=GEMMA),
    "gemma3_text": Family(
        seed=134, settings={"rope_parameters": {"sliding_attention": LOCAL, "full_attention": GLOBAL}, "head_dim": 16,
                          "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24},
        dtype="bfloat16", neutral={**GEMMA, "query and key norms": (r"[qk]_norm\.weight$", 0.0)},
        without={**EVERY, "window": {"sliding_window": 1_000}, "scale": {"query_pre_attn_scalar": 16},
                 "pattern": {"layer_types": ["sliding_attention"] * 7},
                 "local base": {"rope_parameters": {"sliding_attention": {**LOCAL, "rope_theta": 1_000.0},
                                                    "full_attention": GLOBAL}},
                 "global base": {"rope_parameters": {"sliding_attention": LOCAL,
                                                     "full_attention": {**GLOBAL, "rope_theta": 100.0}}},
                 "linear scaling": {"rope_parameters": {"sliding_attention": LOCAL,
                                                        "full_attention": {**LOCAL, "rope_theta": 1_000.0}}}}),
}


def fill(model: Any, seed: int, dtype: str = "float32") -> Any:
    """The model with random parameters, float32 numbers that `dtype` can hold.

    Linear maps have standard deviation 1 / sqrt(inputs), embeddings 0.2, biases and what norms add to their neutral
    value 0.3: activations of order 1, so that nothing that is done to them goes unseen.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.normal(size=tuple(parameter.shape)).astype(np.float32))
            if "norm" in name:
                noise = parameter.mean() + 0.3 * noise
            elif "embed" in name:
                noise = 0.2 * noise
            else:
                noise = noise * (parameter.shape[-1]**-0.5 if parameter.ndim > 1 else 0.3)
            parameter.copy_(noise.to(torch.float32).to(vars(torch)[dtype]))
    return model.eval()


def build(model_type: str, settings: dict[str, Any], seed: int, dtype: str = "float32") -> Any:
    """A random causal language model in float32."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **copy.deepcopy(settings)})
    return fill(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed, dtype)


def logits_of(model: Any, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """What the model says [B, L, V] (a classifier: [B, labels]) about tokens [B, L]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), **options).logits.float().numpy()


def greedy(model: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    """The `count` likeliest tokens [count] after a prompt [L], whatever ends a text."""
    import torch

    never = model.config.vocab_size
    with torch.no_grad():
        text = model.generate(torch.from_numpy(prompt[None].astype(np.int64)), do_sample=False, max_new_tokens=count,
                              eos_token_id=never, pad_token_id=0)
    return text[0, len(prompt):].numpy().astype(np.int32)


def margin(model: Any, prompt: np.ndarray, answer: np.ndarray) -> float:
    """How far the second logit is behind, at the closest step of a greedy answer; checks that it is one."""
    logits = logits_of(model, np.concatenate([prompt, answer])[None])[0, len(prompt) - 1:-1]
    ordered = np.sort(logits, axis=1)
    assert (logits.argmax(axis=1) == answer).all(), "generate() and the forward pass disagree"
    return float((ordered[:, -1] - ordered[:, -2]).min())


def moves(model: Any, family: Family, tokens: np.ndarray) -> dict[str, float]:
    """By feature: the largest change of a logit when it is switched off."""
    import torch

    expected, found = logits_of(model, tokens), {}
    for feature, settings in family.without.items():
        other = build(model.config.model_type, {**family.settings, **settings}, family.seed, family.dtype)
        other.load_state_dict(model.state_dict())
        found[feature] = float(np.abs(logits_of(other, tokens) - expected).max())
    for feature, (pattern, value) in family.neutral.items():
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in (*other.named_parameters(), *other.named_buffers()):
                if re.search(pattern, name):
                    parameter.fill_(value)
        found[feature] = float(np.abs(logits_of(other, tokens) - expected).max())
    return found


def texts(seed: int, *shape: int) -> np.ndarray:
    """Random tokens, none of them padding."""
    return np.random.default_rng([seed, 1]).integers(1, SIZES["vocab_size"], shape).astype(np.int32)


def save(model: Any, folder: pathlib.Path, dtype: str = "float32", shard: str = "5GB") -> None:
    """The folder that `save_pretrained` writes."""
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(vars(torch)[dtype]).save_pretrained(folder, max_shard_size=shard)


def write_family(folder: pathlib.Path, model_type: str, family: Family) -> None:
    """One checkpoint with its expected logits and greedy answer.

    Raises:
      ValueError: if a feature does nothing, or greedy decoding comes close to a tie: another seed is needed.
    """
    model = build(model_type, family.settings, family.seed, family.dtype)
    if family.stops is not None:
        model.generation_config.eos_token_id = family.stops
    tokens = texts(family.seed, TEXTS, LENGTH)
    prompt = tokens[0, :PROMPT]
    answer = greedy(model, prompt, GREEDY)
    closest, moved = margin(model, prompt, answer), moves(model, family, tokens)
    logits = logits_of(model, tokens)
    print(f"{model_type}: logits up to {np.abs(logits).max():.2f}, {len(set(answer.tolist()))} greedy tokens, margin "
          f"{closest:.4f}; " + ", ".join(f"{feature} {size:.3f}" for feature, size in moved.items()))
    still = [feature for feature, size in moved.items() if size < SMALLEST_MOVES.get(feature, SMALLEST_MOVE)]
    if still or closest < SMALLEST_MARGIN or len(set(answer.tolist())) < FEWEST_TOKENS:
        raise ValueError(f"{model_type} with seed {family.seed} shows too little: take another seed.")
    save(model, folder, family.dtype, family.shard)
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits, prompt=prompt, greedy=answer)


def write_reward(folder: pathlib.Path, seed: int = 0) -> None:
    """A reward model of the Qwen3 family with the scores of two texts, padded on the right to one length."""
    import torch
    import transformers

    settings = {**SIZES, **FAMILIES["qwen3"].settings, "num_labels": 1}
    config = transformers.AutoConfig.for_model("qwen3", **copy.deepcopy(settings))
    model = fill(transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"), seed)
    tokens, lengths = texts(seed, 2, 12), np.array([12, 7], np.int32)
    mask = np.arange(12)[None, :] < lengths[:, None]
    tokens = np.where(mask, tokens, config.pad_token_id).astype(np.int32)
    scores = logits_of(model, tokens, attention_mask=torch.from_numpy(mask.astype(np.int64)))[:, 0]
    print(f"qwen3_reward: scores {scores}")
    save(model, folder)
    np.savez(folder / "expected.npz", tokens=tokens, lengths=lengths, scores=scores)


def write_adapter(folder: pathlib.Path, base_folder: pathlib.Path, seed: int = 0) -> None:
    """A LoRA adapter of a checkpoint with the logits that the two give together."""
    import peft
    import transformers

    shutil.rmtree(folder, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager").eval()
    model.name_or_path = base_folder.name  # not the path on the machine that this ran on
    tokens = texts(seed, TEXTS, LENGTH)
    before = logits_of(model, tokens)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    fill_adapter(adapted, seed)
    logits = logits_of(adapted, tokens)
    moved = float(np.abs(logits - before).max())
    print(f"lora: logits move by up to {moved:.3f}")
    assert moved > SMALLEST_MOVE
    save_adapter(adapted, folder)
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits)


def fill_adapter(adapted: Any, seed: int) -> None:
    """Random factors A and B; peft starts with B = 0, which adds nothing."""
    import torch

    rng = np.random.default_rng([seed, 2])
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if ".lora_" in name:
                noise = rng.normal(size=tuple(parameter.shape)) * parameter.shape[-1]**-0.5
                parameter.copy_(torch.from_numpy(noise.astype(np.float32)))


def save_adapter(adapted: Any, folder: pathlib.Path) -> None:
    """What peft writes but for its README.md; lists that come from sets are sorted."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(folder: pathlib.Path) -> None:
    """Every golden folder."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for model_type, family in FAMILIES.items():
        write_family(folder / model_type, model_type, family)
        assert sum(file.stat().st_size for file in (folder / model_type).iterdir()) < MOST_BYTES, model_type
    write_reward(folder / "qwen3_reward")
    write_adapter(folder / "lora", folder / "qwen3")


def main(_: list[str]) -> None:
    """Writes, and prints what each checkpoint shows."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    make(pathlib.Path(FOLDER.value))


if __name__ == "__main__":
    app.run(main)
