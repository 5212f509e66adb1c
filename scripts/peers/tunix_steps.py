"""tunix's side of `benchmark.py peers`: `GRPOLearner` over an `RLCluster` on a Qwen2 model made here, a turn at a time.

What was chosen, and why:
- Actor, reference and rollout on the one CPU device; actor and rollout share their weights, so none are copied.
- The "vanilla" rollout engine, tunix's own and the only one without a server; its cache holds exactly prompt and answer.
  top_p=1 without top_k takes its fast path, which samples without sorting.
- The whole batch in one piece, one update per rollout: no accumulation, no second pass for old log-probabilities.
- The sampler's key is another one in each step; left alone, it would be the same one.
- float32 without rematerialisation: it would only cost time at this size.
- optax's AdamW behind a global-norm clip, the work's numbers.
- The embedding, which is the head, too, is scaled to 0.02: tunix draws it from N(0, 1), and a head of that size is all but
  deterministic. Speed does not depend on it.
- No logging, no saving. Threads are XLA's default.
- The tokenizer has the ids as words, and its end and padding lie behind the vocabulary: no answer ends early.
- The reward reads the text that tunix hands it; every word is an id.
"""
from collections.abc import Iterator

import jax
import numpy as np
import optax
import turns
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

ENDLESS = 10_000_000  # steps: the talk ends the run


class Numbers:
    """Ids as words; behind them padding and an end that the model cannot draw."""

    def __init__(self, size: int):
        """
        Args:
          size: V.
        """
        self._size = size

    def encode(self, text: str, **_) -> list[int]:
        """The ids of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_) -> str:
        """The text of ids."""
        return " ".join(str(i) for i in ids)

    def bos_id(self) -> int:
        """0 is none, to tunix."""
        return 0

    def pad_id(self) -> int:
        """Not in the vocabulary."""
        return self._size

    def eos_id(self) -> int:
        """Not in the vocabulary."""
        return self._size + 1


class Turns:
    """The batches of a run, each handed out when a step is wanted, and the scores of the answers."""

    def __init__(self, pace: turns.Pace, cluster: rl_cluster.RLCluster):
        """
        Args:
          pace: the talk.
          cluster: whose actor is trained.
        """
        self._pace, self._cluster, self._tokens, self._reward = pace, cluster, 0, 0.0

    def score(self, prompts: list[str], completions: list[str], **_) -> list[float]:
        """The share of even ids of each answer."""
        answers = [text.split() for text in completions]
        scores = [sum(int(word) % 2 == 0 for word in words) / len(words) for words in answers]
        self._tokens, self._reward = sum(map(len, answers)), sum(scores) / len(scores)
        return scores

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Prompts, as long as steps are wanted: tunix asks for a batch when it has learned from the one before."""
        work, model, step = self._pace.work, self._cluster.actor_trainer.model, 0
        texts = np.array([" ".join(map(str, ids)) for ids in work["prompts"]])
        size = work["prompts_per_step"]
        wanted = self._pace.built(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))), some(model))
        while wanted:
            self._cluster.cluster_config.rollout_config.seed = jax.random.key_data(jax.random.key(step))
            yield {"prompts": texts[np.arange(step * size, (step + 1) * size) % len(texts)]}
            jax.block_until_ready(nnx.state(model))
            wanted, step = self._pace.made(self._tokens, [self._reward], lambda: some(model)), step + 1


def some(model: nnx.Module) -> list[float]:
    """A few numbers of two of the trained arrays."""
    arrays = (model.embedder.input_embedding[...], model.final_norm.w[...])
    return [float(number) for array in arrays for number in np.asarray(array.ravel()[:8])]


def model_of(work: dict) -> qwen2.Qwen2:
    """The work's network with fresh weights, always the same."""
    made = qwen2.Qwen2(qwen2.ModelConfig(
        num_layers=work["layers"], vocab_size=work["vocabulary"], embed_dim=work["width"], hidden_dim=work["inner"],
        num_heads=work["heads"], head_dim=work["head_size"], num_kv_heads=work["key_heads"], rope_theta=work["rotary_base"],
        norm_eps=work["norm_epsilon"], use_tied_embedding=True), rngs=nnx.Rngs(params=0))
    made.embedder.input_embedding[...] = made.embedder.input_embedding[...] * 0.02
    return made


def cluster_of(work: dict) -> rl_cluster.RLCluster:
    """Actor, reference and rollout on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles, length = rl_cluster.Role, work["prompt_length"] + work["completion_length"]
    adam = optax.adamw(work["learning_rate"], work["beta1"], work["beta2"], work["epsilon"],
                       weight_decay=work["weight_decay"])
    return rl_cluster.RLCluster(
        actor=model_of(work), reference=model_of(work), tokenizer=Numbers(work["vocabulary"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)}, rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(work["clip_norm"]), adam),
                eval_every_n_steps=ENDLESS, max_steps=ENDLESS),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work["completion_length"], max_prompt_length=work["prompt_length"],
                kv_cache_size=length, temperature=1.0, top_p=1.0, top_k=None)))


def main() -> None:
    """Trains as long as steps are wanted."""
    pace = turns.Pace()
    cluster = cluster_of(pace.work)
    own = Turns(pace, cluster)
    numbers = grpo_learner.GRPOConfig(num_generations=pace.work["group_size"], num_iterations=1, beta=pace.work["beta"],
                                      epsilon=pace.work["clip"])
    grpo_learner.GRPOLearner(cluster, numbers, own.score).train(own.batches())


if __name__ == "__main__":
    main()
