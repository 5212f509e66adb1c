"""trl's side of `benchmark.py peers`: `GRPOTrainer` on a Qwen2 model made here, a turn at a time.

What was chosen, and why:
- `model.generate` of transformers, in eager mode with its dynamic cache: vLLM is not for this comparison (it does not run
  beside training on a CPU). top_k=0 and top_p=1, so that no filter is applied.
- The whole batch in one piece, one update per rollout: no accumulation, no second pass for old log-probabilities.
- loss_type="grpo", beta and the clip of the work; the reference is a second copy of the first weights, as trl makes it.
- float32 without gradient checkpointing: both would only cost time at this size. Attention is torch's fused one.
- transformers' AdamW, fused, with the work's numbers; the rate is constant.
- No logging, no saving, no progress bar.
- Threads are torch's default or one, as the benchmark asks: where arrays are small or cores are busy, threads that wait for
  each other can cost many times what they save.
- The tokenizer has the ids as words, and its end and padding lie behind the vocabulary: no answer ends early, so that
  min_new_tokens, and its pass over the logits at each token, is not needed.
- The reward reads the ids that trl hands it.
"""
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl
import turns

ENDLESS = 10_000_000  # steps: the talk ends the run


class Turns(transformers.TrainerCallback):
    """Holds the trainer between two steps until the next is wanted, and scores the answers for it."""

    def __init__(self, pace: turns.Pace):
        """
        Args:
          pace: the talk.
        """
        self._pace, self._tokens, self._reward = pace, 0, 0.0

    def score(self, completion_ids: list[list[int]], **_) -> list[float]:
        """The share of even ids of each answer."""
        scores = [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
        self._tokens, self._reward = sum(map(len, completion_ids)), sum(scores) / len(scores)
        return scores

    def on_train_begin(self, args, state, control, model=None, **_):
        """Waits for the first step."""
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self._go_on(control, self._pace.built(parameters, some(model), sorted({torch.get_num_threads(), 1})))

    def on_step_end(self, args, state, control, model=None, **_):
        """Waits for the next."""
        return self._go_on(control, self._pace.made(self._tokens, [self._reward], lambda: some(model)))

    def _go_on(self, control, wanted):
        control.should_training_stop = not wanted
        torch.set_num_threads(self._pace.threads or 1)
        return control


def some(model: torch.nn.Module) -> list[float]:
    """A few numbers of two of the trained arrays."""
    arrays = (model.get_input_embeddings().weight, model.model.norm.weight)
    return [number for array in arrays for number in array.detach().flatten()[:8].tolist()]


def model_of(work: dict) -> transformers.Qwen2ForCausalLM:
    """The work's network with fresh weights."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=work["vocabulary"], hidden_size=work["width"], num_hidden_layers=work["layers"],
        num_attention_heads=work["heads"], num_key_value_heads=work["key_heads"], head_dim=work["head_size"],
        intermediate_size=work["inner"], tie_word_embeddings=True, rms_norm_eps=work["norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": work["rotary_base"]},
        max_position_embeddings=work["prompt_length"] + work["completion_length"],
        bos_token_id=None, eos_token_id=None, dtype="float32"))


def tokenizer_of(size: int) -> transformers.PreTrainedTokenizerFast:
    """Ids as words; behind them padding and an end that the model cannot draw."""
    words = {str(i): i for i in range(size)} | {"<pad>": size, "<end>": size + 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>",
                                                padding_side="left")


def settings(work: dict, folder: str) -> trl.GRPOConfig:
    """The trainer's numbers."""
    rows = work["prompts_per_step"] * work["group_size"]
    return trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0, max_steps=ENDLESS,
        per_device_train_batch_size=rows, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
        num_generations=work["group_size"], max_completion_length=work["completion_length"], temperature=1.0, top_p=1.0,
        top_k=0, loss_type="grpo", beta=work["beta"], epsilon=work["clip"], learning_rate=work["learning_rate"],
        lr_scheduler_type="constant", adam_beta1=work["beta1"], adam_beta2=work["beta2"], adam_epsilon=work["epsilon"],
        weight_decay=work["weight_decay"], max_grad_norm=work["clip_norm"], optim="adamw_torch_fused", logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False)


def main() -> None:
    """Trains as long as steps are wanted."""
    pace = turns.Pace()
    work, own = pace.work, Turns(pace)
    torch.manual_seed(0)
    prompts = datasets.Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in work["prompts"]]})
    with tempfile.TemporaryDirectory() as folder:
        model_of(work).save_pretrained(folder)  # trl reads policy and reference from one place
        trainer = trl.GRPOTrainer(model=folder, reward_funcs=own.score, args=settings(work, folder), train_dataset=prompts,
                                  processing_class=tokenizer_of(work["vocabulary"]), callbacks=[own])
        trainer.train()


if __name__ == "__main__":
    main()
