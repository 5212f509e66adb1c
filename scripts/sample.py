"""A prompt in, completions out, with log-probability and entropy.

python scripts/sample.py --workdir=runs/a --prompt="3 + 4 =" --samples=4
"""
import pathlib
import sys

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
_WORKDIR = flags.DEFINE_string("workdir", None, "The run whose policy answers.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt's text; a held-out question if none is given.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (by validation), latest, a step, or a phase's name.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Completions.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "0 keeps all.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "1 keeps all.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "0 keeps all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
_TOKENS = flags.DEFINE_bool("tokens", False, "Also print each token with its numbers.")


def main(_: list[str]) -> None:
    """Loads, draws, prints."""
    logging.set_verbosity(logging.WARNING)
    try:
        sample()
    except (ValueError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def sample() -> None:
    """The completions of one prompt, numbers of the distribution that drew them (greedy: certain, so 0)."""
    import jax
    import jax.numpy as jnp
    import rich.console
    import rich.table

    from rl_jax.recipe import Rollout
    from rl_jax.rollout import decode
    from rl_jax.tasks import judge, stream
    from rl_jax.tasks import task as tasks
    from rl_jax.train import trained

    found = trained.load(_WORKDIR.value, _CHECKPOINT.value)
    task, tokenizer = found.experiment.task, found.experiment.task.tokenizer
    if _PROMPT.value is None:
        example = task.splits.get("held_out", task.splits["train"])[0]
    else:
        example = tasks.question(task, _PROMPT.value)
    rollout = Rollout(group_size=_SAMPLES.value, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
                      top_p=_TOP_P.value, min_p=_MIN_P.value)
    draw = jax.jit(decode.make_rollout(found.network, rollout, completion_length=task.completion_length,
                                       stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id))
    uniforms = decode.make_uniforms(jax.random.key(_SEED.value), 1, _SAMPLES.value, task.completion_length)
    samples = jax.device_get(draw(found.policy, jax.device_put(stream.batch(task, [example])), uniforms,
                                  jnp.asarray(found.step, jnp.int32)))
    table = rich.table.Table(title=f"{example.text!r} (step {found.step})", title_justify="left")
    for name in ("completion", "tokens", "ended", "log-probability", "entropy per token"):
        table.add_column(name, justify="left" if name == "completion" else "right")
    texts = judge.texts_of(tokenizer, samples.tokens, samples.mask)
    for n, text in enumerate(texts):
        length = int(samples.mask[n].sum())
        table.add_row(repr(text), str(length), "yes" if samples.finished[n] else "no",
                      f"{samples.rollout_logp[n].sum():.3f}", f"{samples.rollout_entropy[n].sum() / length:.3f}")
    console = rich.console.Console()
    console.print(table)
    if _TOKENS.value:
        for n in range(len(texts)):
            console.print(f"completion {n}: " + "  ".join(
                f"{'<end>' if t in tokenizer.stop_ids else repr(tokenizer.decode([int(t)]))} {p:.3f}/{h:.3f}"
                for t, p, h, m in zip(samples.tokens[n], samples.rollout_logp[n], samples.rollout_entropy[n],
                                      samples.mask[n], strict=True) if m), markup=False, highlight=False)


if __name__ == "__main__":
    app.run(main)
