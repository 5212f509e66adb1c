"""A policy that was trained here on chats of GSM8K's form loads in transformers, and says the same there."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models import pretrained
from rl_jax.tasks import chat
from rl_jax.train import trained
from tests.ends import published, test_published, tiny

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("train", ["all", "lora"])
def test_what_a_run_exports_loads_in_transformers(train, tmp_path):
    import torch
    import transformers

    start = published.make(tmp_path / "start")
    grpo = {} if train == "all" else {"train": "lora", "lora": {"rank": 2, "alpha": 4.0, "targets": "query|value"}}
    tiny.train(tmp_path / "run", test_published.config(start, grpo=grpo))
    found = trained.load(tmp_path / "run", "latest")
    policy = dataclasses.replace(pretrained.load(start), network=found.network, parameters=found.policy)
    pretrained.save(policy, tmp_path / "out")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "How many are 3 pears and 4 more?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == chat.Chat(policy.tokenizer).ids(messages, add_generation_prompt=True, enable_thinking=False)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    ours = jax.jit(lambda p: dataclasses.replace(policy, parameters=p).logits(jnp.array([ids])))(found.policy)
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
