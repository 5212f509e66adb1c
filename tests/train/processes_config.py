"""A config for runs of several processes, cut over the mesh that it is given: data=2,fsdp=2."""
import ml_collections

from tests.ends import tiny

STEPS = 12


def get_config(mesh: str) -> ml_collections.ConfigDict:
    """Sums with a host verifier, saved every third step, validated once on the way."""
    return tiny.config(
        "reasoning_gym", steps=STEPS, prompts_per_step=8, run={
            "checkpoint_every": 3, "validate_every": 5, "validation_prompts": 4, "validation_samples": 2},
        mesh={axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}, task_args={
            "generator": "chain_sum", "keep_after": ": ", "prompt_length": 16, "completion_length": 6, "train_size": 64,
            "validation_size": 4, "held_out_size": 8,
            "options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}})
