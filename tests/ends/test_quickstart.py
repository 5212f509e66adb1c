"""The quickstart teaches: from a warm start of about a half to most held-out problems solved, on the mean of 2 seeds."""
import json
import re

import pytest

from tests.ends import tiny

SEEDS = (0, 1)
WARM_START = (0.45, 0.60)  # aimed at 0.50 to 0.55, by the length of the supervised phase
FINAL, RISE = 0.85, 0.25


def pass_at_1(workdir, which, cache) -> float:
    """Of 512 held-out problems x 8 samples at temperature 1."""
    status, said = tiny.Script("evaluate.py", f"--workdir={workdir}", f"--checkpoint={which}", "--problems=512",
                               "--samples=8", "--temperature=1", "--split=held_out", cache=cache, optimised=True).end(600)
    assert status == 0, said
    return {row["name"]: row["value"] for row in json.loads((workdir / "evaluation.json").read_text())}["pass@1"]


@pytest.mark.slow
def test_two_seeds_learn(tmp_path, cache_directory):
    found = {}
    for seed in SEEDS:
        workdir = tmp_path / str(seed)
        status, said = tiny.Script("train.py", "--config=configs/quickstart.py", f"--workdir={workdir}",
                                   f"--config.run.seed={seed}", cache=cache_directory, optimised=True).end(3600)
        assert status == 0, said
        counts = re.search(r"chain_sum: held_out 512 of 512.*", said)
        assert counts, "the splits and what was left out of them are printed"
        found[seed] = {which: pass_at_1(workdir, which, cache_directory) for which in ("sft", "latest", "best")}
    print(json.dumps(found))
    starts = [of["sft"] for of in found.values()]
    ends = [max(of["latest"], of["best"]) for of in found.values()]  # best: chosen on validation, not on these
    assert WARM_START[0] <= sum(starts) / len(SEEDS) <= WARM_START[1], found
    assert sum(ends) / len(SEEDS) >= FINAL, found
    assert (sum(ends) - sum(starts)) / len(SEEDS) >= RISE, found
