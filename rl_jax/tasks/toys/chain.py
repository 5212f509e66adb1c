"""A sum of several terms modulo m, answered with every running total: steps that can be checked."""
import string

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_jax.reward import exact
from rl_jax.tasks import task
from rl_jax.tasks.toys import symbols


def chain(
    terms: int = 4,
    modulus: int = 10,
    *,
    train_size: int = 2048,
    validation_size: int = 128,
    held_out_size: int = 256,
    seed: int = 0,
) -> task.Task:
    """`7-4+8=` asks for `31` and the end token: the total after each further term, one digit each.

    The last total decides the score. The part "steps" is the share of right totals before it.

    Args:
      terms: numbers in a question, 3 to 12; the completion has `terms` tokens with its end.
      modulus: m, 2 to 10; terms and totals are digits below it.
      train_size, validation_size, held_out_size: distinct questions, none in two splits; 0 leaves
        the split out.
      seed: fixes the questions.
    """
    sizes = {"train": train_size, "validation": validation_size, "held_out": held_out_size}
    there_are = modulus**terms * 2 ** (terms - 1)
    if not 3 <= terms <= 12 or not 2 <= modulus <= 10 or min(sizes.values()) < 0 or sum(sizes.values()) > there_are:
        raise ValueError(f"terms={terms}, modulus={modulus}, sizes={sizes}: allowed are terms 3 to 12, modulus 2 to 10 "
                         f"and sizes >= 0 that add up to at most the number of questions, {there_are}.")
    tokenizer = symbols.Symbols(string.digits + "+-=")
    number = np.random.default_rng(seed).choice(there_are, sum(sizes.values()), replace=False)
    examples = [_example(*row, tokenizer) for row in zip(*questions(number, terms, modulus), strict=True)]
    ends = np.cumsum(list(sizes.values()))
    splits = {name: tuple(examples[end - size : end])
              for (name, size), end in zip(sizes.items(), ends, strict=True) if size}
    return task.Task(
        name="chain", splits=splits, tokenizer=tokenizer, verifier=task.PureVerifier(score),
        prompt_length=2 * terms, completion_length=terms, final_answer=lambda text: text[-1:] or None,
        fingerprint=task.fingerprint("chain", terms=terms, modulus=modulus, sizes=sizes, seed=seed))


def questions(
    number: Int[np.ndarray, " M"], terms: int, modulus: int
) -> tuple[Int[np.ndarray, "M terms"], Int[np.ndarray, "M terms-1"], Int[np.ndarray, "M terms-1"]]:
    """Question number -> its terms, the sign (1 or -1) before each further one, the total after it.

    The numbers below modulus^terms * 2^(terms - 1) are all questions, each once.
    """
    signs, digits = np.divmod(number, modulus**terms)
    term = digits[:, None] // modulus ** np.arange(terms) % modulus
    sign = 1 - 2 * (signs[:, None] // 2 ** np.arange(terms - 1) % 2)
    total = (term[:, :1] + np.cumsum(sign * term[:, 1:], axis=1)) % modulus
    return term, sign, total


def _example(term, sign, total, tokenizer: symbols.Symbols) -> task.Example:
    steps = (("+" if s > 0 else "-") + str(t) for s, t in zip(sign, term[1:], strict=True))
    text = str(term[0]) + "".join(steps) + "="
    answer = [*tokenizer.encode("".join(str(t) for t in total)), tokenizer.end_id]
    return task.Example(prompt=tokenizer.encode(text), text=text, facts={"answer": np.array(answer, np.int32)},
                        answer=answer)


def score(
    facts: dict[str, Array], tokens: Int[Array, "N T"], mask: Bool[Array, "N T"]
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """1 if the last total is right and the end follows it; "steps": the share of right totals before it."""
    target = facts["answer"]
    last_two = jnp.broadcast_to(jnp.arange(target.shape[1]) >= target.shape[1] - 2, target.shape)
    chosen = jnp.all(mask, axis=1)
    final = chosen * exact.match(tokens, mask & last_two, target, last_two)
    return final, {"steps": exact.share(tokens, mask, target, ~last_two)}
