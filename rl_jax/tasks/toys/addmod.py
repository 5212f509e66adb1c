"""`a+b=` modulo m, all m^2 questions of it."""
import string

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_jax.reward import exact
from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols


def addmod(modulus: int = 10, *, validation_size: int = 10, held_out_size: int = 20, seed: int = 0) -> task.Task:
    """The answer is (a + b) mod m in decimal digits and the end token, matched token for token.

    Args:
      modulus: m, at least 2. The m^2 questions are dealt to the splits, training gets the rest.
      validation_size, held_out_size: questions; 0 leaves the split out.
      seed: fixes the deal.
    """
    sizes = {"held_out": held_out_size, "validation": validation_size}
    train_size = modulus**2 - held_out_size - validation_size
    if modulus < 2 or min(sizes.values()) < 0 or train_size < 1:
        raise ValueError(f"modulus={modulus}, validation_size={validation_size}, held_out_size={held_out_size}: "
                         "allowed are modulus >= 2 and sizes >= 0 that leave some of the modulus^2 questions to train.")
    tokenizer = symbols.Symbols(string.digits + "+=")
    digits = len(str(modulus - 1))
    order = np.random.default_rng(seed).permutation(modulus**2)
    dealt = np.split(order, np.cumsum(list(sizes.values())))
    splits = {name: tuple(_example(int(i), modulus, digits + 1, tokenizer) for i in numbers)
              for name, numbers in zip((*sizes, "train"), dealt, strict=True) if len(numbers)}
    return task.Task(
        name="addmod", splits=splits, tokenizer=tokenizer, verifier=task.PureVerifier(score),
        prompt_length=2 * digits + 2, completion_length=digits + 1,
        fingerprint=task.fingerprint("addmod", modulus=modulus, sizes=sizes, seed=seed))


def _example(number: int, modulus: int, completion_length: int, tokenizer: symbols.Symbols) -> task.Example:
    a, b = divmod(number, modulus)
    text = f"{a}+{b}="
    answer = [*tokenizer.encode(str((a + b) % modulus)), tokenizer.end_id]
    target = np.full(completion_length, tokenizer.pad_id, np.int32)
    target[: len(answer)] = answer
    facts = {"answer": target, "answer_mask": np.arange(completion_length) < len(answer)}
    return task.Example(prompt=tokenizer.encode(text), text=text, facts=facts, answer=answer)


def score(
    facts: dict[str, Array], tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """1 for the right number followed by the end token; else 0."""
    return exact.match(tokens, mask, facts["answer"], facts["answer_mask"]), {}
