"""The page holds everything, shows text as text, loads nothing, and copes with runs of any length."""
import html.parser
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from rl_jax.train import evaluation, metrics, report

HOSTILE = '</script><b>bold</b><!--<script>"\'&\u2028<img src="https://example.org/x">'
ROOT = pathlib.Path(__file__).parents[2]


class Reader(html.parser.HTMLParser):
    """Every tag with its attributes, and the text inside each script element."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def embedded(page):
    return json.loads(Reader(page).scripts[0])


def make_run(workdir, steps, sft=0):
    with metrics.Writer(workdir) as writer:
        for step in range(1, steps + 1):
            phase = "sft" if step <= sft else "rl"
            values = {"loss/total": 1 / step, "gradient/norm": math.nan if step == 3 else 1.0,
                      "reward/failed": step == 2, "speed/tokens_per_s": 100.0 * step,
                      "rollout/logp_gap_nats": 1e-6, "mine/extra": 2}
            if phase == "rl":
                values |= {"reward/mean": step / steps, "reward/format": 0.1, "policy/entropy": 1.0}
            writer.metrics(step, phase, values)
            if step % 2 == 0:
                writer.metrics(step, phase, {"validation/pass@1": step / steps, "validation/pass@1_stderr": 0.01})
            writer.rollouts(step, phase, [
                {"group": g, "prompt": f"prompt {g}", "completion": HOSTILE, "score": 1.0, "reward": float(k),
                 "parts": {"format": 0.1}, "advantage": None, "logp_sum": -1.0, "logp_mean": -0.5, "entropy": 0.1,
                 "tokens": 2, "finished": True, "failed": False} for g in range(2) for k in range(3)])


@pytest.fixture
def workdir(tmp_path):
    path = tmp_path / "a <run>"
    make_run(path, 6, sft=2)
    (path / "config.json").write_text(json.dumps({"task": {"name": HOSTILE}, "recipe": {"name": "baselines.grpo"}}))
    (path / "plan.json").write_text(json.dumps([{"phase": "rollout", "flops": 1e9, "bytes": 2**20}]))
    evaluation.write(path, {"pass@1": (0.871, 0.009), "avg@8": (math.nan, math.nan), "count/problems": (512.0, 0.0)})
    return path


def test_page_holds_what_the_run_left(workdir):
    path = report.write(workdir)
    assert path == workdir / "report.html" and list(workdir.glob("*.unfinished")) == []
    data = embedded(path.read_text(encoding="utf-8"))
    assert [row["step"] for row in data["rows"]] == [1, 2, 3, 4, 5, 6]
    assert data["rows"][1]["validation/pass@1"] == 2 / 6 and data["rows"][2]["gradient/norm"] == "NaN"
    assert [(phase["name"], phase["first"], phase["last"]) for phase in data["phases"]] == [("sft", 1, 2), ("rl", 3, 6)]
    assert [step["step"] for step in data["groups"]] == [1, 2, 3, 4, 5, 6]
    assert [len(group["samples"]) for group in data["groups"][0]["groups"]] == [3, 3]
    assert data["groups"][0]["groups"][1]["prompt"] == "prompt 1"
    assert data["plan"][0]["flops"] == 1e9 and data["config"]["recipe"] == {"name": "baselines.grpo"}
    tiles = {tile["label"]: tile["value"] for tile in data["tiles"]}
    assert tiles["held-out pass@1"] == "87.1 %" and tiles["best validation pass@1"] == "100.0 %"
    assert any("gradient/norm is not finite in 1 of 6 steps, first in step 3" in note for note in data["notes"])
    assert any("verifier failed in 1 steps" in note for note in data["notes"])


def test_text_of_the_run_stays_text(workdir):
    page = report.write(workdir).read_text(encoding="utf-8")
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags if tag in ("b", "img")] == []
    assert len(reader.scripts) == 2 and page.count("</script>") == 2
    assert "<title>a &lt;run&gt;</title>" in page
    data = embedded(page)
    assert data["groups"][0]["groups"][0]["samples"][0]["completion"] == HOSTILE
    assert data["config"]["task"]["name"] == HOSTILE
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", reader.scripts[1])


def test_page_loads_nothing(workdir):
    page = report.write(workdir).read_text(encoding="utf-8")
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    written = page.replace(re.search(r'id="data">(.*?)</script>', page, re.S)[1], "")
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|fetch\(|XMLHttpRequest|import\(", written)


def test_every_element_that_the_script_asks_for_is_there(workdir):
    reader = Reader(report.write(workdir).read_text(encoding="utf-8"))
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert set(re.findall(r'by\("([^"]+)"\)', reader.scripts[1])) <= ids


def test_charts_show_what_is_there_and_forget_nothing(workdir):
    data = report.payload(workdir)
    charts = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert charts["Reward"] == ("reward/mean",) and charts["Reward parts"] == ("reward/format",)
    assert charts["mine/extra"] == ("mine/extra",) and "Clipped tokens" not in charts
    shown = {name for series in charts.values() for name in series}
    logged = {name for row in data["rows"] for name in row} - set(metrics.HEAD)
    assert logged - shown == {"validation/pass@1_stderr"}


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_started(tmp_path, steps):
    make_run(tmp_path, steps)
    data = embedded(report.write(tmp_path).read_text(encoding="utf-8"))
    assert len(data["rows"]) == len(data["groups"]) == steps
    assert (data["notes"] == ["No step is done yet."]) == (steps == 0)
    assert data["evaluation"] == [] and data["config"] == {}


def test_a_run_without_sampled_answers(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"phase":"sft","time_s":0.5,"loss/total":2.0}\n{"step":2,"ph')
    data = embedded(report.write(tmp_path).read_text(encoding="utf-8"))
    assert [row["step"] for row in data["rows"]] == [1] and data["groups"] == []


def test_long_runs_are_thinned_to_means_within_a_phase():
    rows = [{"step": s, "phase": "a" if s <= 5 else "b", "time_s": float(s), "x": float(s)} for s in range(1, 12)]
    rows[7] |= {"x": "NaN", "rare": 4.0}
    shown, per_point = report.thin(rows, 4)
    assert per_point == 3
    assert [(row["step"], row["phase"], row["x"]) for row in shown] == \
        [(3, "a", 2.0), (5, "a", 4.5), (8, "b", 6.5), (11, "b", 10.0)]
    assert [row.get("rare") for row in shown] == [None, None, 4.0, None]
    assert report.thin(rows, 100) == (rows, 1)


def test_long_runs_keep_the_first_and_the_last_groups():
    rows = [{"step": s, "phase": "rl", "group": 0, "prompt": "p", "completion": "c"} for s in range(1, 101)]
    found, left_out = report.groups(rows, 5)
    assert [step["step"] for step in found] == [1, 26, 51, 75, 100] and left_out == 95


def run_script(workdir):
    return subprocess.run([sys.executable, ROOT / "scripts" / "report.py", f"--workdir={workdir}"], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_script_prints_the_path(workdir):
    done = run_script(workdir)
    assert (done.returncode, done.stdout.strip()) == (0, str(workdir / "report.html")), done.stderr


def test_script_says_what_is_wrong(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 1 and "has no metrics.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_file_is_named(workdir):
    (workdir / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="plan.json is not JSON"):
        report.write(workdir)
