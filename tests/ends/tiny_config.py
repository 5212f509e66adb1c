"""A config for the scripts' tests: `pure` (supervised, then GRPO in one program), `split` (a host verifier), `short`."""
import ml_collections

from tests.ends import tiny


def get_config(kind: str = "pure") -> ml_collections.ConfigDict:
    """A few dozen steps of next to nothing, saved every few."""
    if kind == "pure":
        return tiny.config(recipe="baselines.grpo", warm_start=10, steps=40, recipe_args={"group_size": 4}, task_args={
            "modulus": 3, "validation_size": 2, "held_out_size": 2},
                           run={"checkpoint_every": 4, "validate_every": 12, "validation_prompts": 4,
                                "validation_samples": 2})
    if kind == "short":
        return tiny.config()
    return tiny.config("reasoning_gym", program="split", steps=24, run={"checkpoint_every": 4}, task_args={
        "generator": "chain_sum", "keep_after": ": ", "prompt_length": 16, "completion_length": 6, "train_size": 64,
        "validation_size": 4, "held_out_size": 8,
        "options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}})
