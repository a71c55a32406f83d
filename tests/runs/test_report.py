"""A run's page: what is on it, what it does with broken files, and how a browser takes it."""

from __future__ import annotations

import contextlib
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_training import TINY, write_chats

from gptoss_jax import harmony, train
from gptoss_jax import report as command
from gptoss_jax.config import Config, DataConfig, ModelConfig, TrainConfig, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.runs import headlines, metrics, report
from gptoss_jax.runs.report import charts, runs
from gptoss_jax.training import held_out

ROOT = Path(__file__).parents[2]
EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quotes"'
LAYERS, EXPERTS = 3, 5


def make_run(workdir: Path, *, steps: int = 40, scale: float = 1.0) -> Path:
    """Write a run with all that a page shows."""
    workdir.mkdir(parents=True)
    rng = np.random.default_rng(0)
    config = Config(
        name="made",
        model=ModelConfig(num_layers=LAYERS, num_experts=EXPERTS, active_experts=2),
        data=DataConfig(train=("a", "b"), weights=(1.0, 3.0)),
        train=TrainConfig(steps=steps),
    )
    (workdir / "config.json").write_text(command_line.to_json(config))
    records, samples = [], []
    for step in range(steps + 1):
        if step:
            load = rng.dirichlet(np.ones(EXPERTS), LAYERS).tolist()
            records.append({
                "step": step, "loss": scale * 3 / step, "grad_norm": 1.5, "learning_rate": 1e-4,
                "tokens": 90, "tokens_per_second": 1000.0 + step, "mfu": 0.25, "step_seconds": 2.0,
                "load_entropy": 0.9, "load_entropy_min": 0.7, "dead_experts": 1, "load_max": 2.5,
                "dropped": 0.125, "balance_loss": 1.1, "z_loss": 2.0, "expert_load": load,
                f"source/{EVIL}/loss": 2.0, f"source/{EVIL}/tokens": 30.0 * step,
                "source/b/c/loss": 1.0, "source/b/c/tokens": 90.0 * step, "of_its_own": step / 7,
            })  # fmt: skip
            if step == 13:
                records[-1]["skipped_steps"] = 2
        if step % 10 == 0:
            scores = {"held_out_loss": 2.0 - step / 40, "exact_match": step / 40}
            records.append({"step": step, **scores})
            for question in range(2):
                asked = {"question": f"question {question} {EVIL}", "expected": "7 8"}
                said = "7 8" if step > 20 else f"{EVIL} {step}"
                samples.append({"step": step, **asked, "answer": said, "right": step > 20})
    spike = {"step": 17, "why": f"the loss {EVIL}", "batch": 16}
    events = [
        {"time": "2026-03-04T05:06:07+0000", "event": "rewind", "step": 10, "spike": spike},
        {"time": "2026-03-04T05:06:08+0000", "event": "damaged", "step": 20, "why": EVIL},
    ]
    for name, lines in (("metrics", records), ("samples", samples), ("events", events)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / f"{name}.jsonl").write_text(text)
    return workdir


class Page(html.parser.HTMLParser):
    """Collects what a test asks of a page; every element that is opened has to be closed."""

    VOID = ("meta", "img", "input", "br", "line", "circle", "polyline", "image")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.figures, self.data, self.titles, self.scripts = [], [], [], 0
        self.text, self.sections, self.open = [], [], []
        self.raw = path.read_text()
        self.feed(self.raw)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures.append(attrs["class"])
        if tag == "section":
            self.sections.append(attrs["id"])
        if tag == "script":
            self.scripts += 1
        if tag == "svg":
            self.titles.append(attrs["aria-label"])
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), value

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and "figure" in self.open:
            self.data.append(json.loads(data))
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


CURVES = [
    "Loss", "Exact match", "Learning rate", "Gradient norm", "Tokens a second", "MFU",
    "Loss by source", "Tokens by source", "Load entropy", "Dead experts", "Largest load", "Dropped",
    "Balance loss", "z-loss",
]  # fmt: skip


def test_the_page_has_all_of_a_run_and_asks_for_nothing(tmp_path):
    workdir = make_run(tmp_path / "run")
    before = {p: p.read_bytes() for p in workdir.iterdir()}
    path = report.write([workdir])
    assert path == workdir / "report.html" and path.stat().st_size < 300_000
    assert {p: p.read_bytes() for p in workdir.iterdir() if p != path} == before
    page = Page(path)
    layers = [f"layer {i}" for i in range(LAYERS)]
    assert page.titles == [*CURVES, "layer by expert", *layers, "of its own"]
    assert page.figures.count("heat") == 1 + LAYERS
    assert page.sections == [
        *("numbers", "curves", "sources", "routing", "load", "samples", "events", "other"),
        *("config", "go-on"),
    ]
    assert page.scripts == len(page.figures) + 1  # values of the figures, and page.js
    assert "default-src 'none'" in page.raw and "http:" not in page.raw.replace(
        "http://www.w3.org/2000/svg", ""
    )
    text = " ".join(page.text)
    for said in ("steps of 40", "1.0000", "100.0%", "0.0750", "1,020", "25.0%", "1:20", "tokens/s"):
        assert said in text, said
    assert "prefers-color-scheme: dark" in page.raw
    for name in ("sample --checkpoint", "convert", "report"):
        assert f"python -m gptoss_jax.{name} " in text


def test_what_a_model_says_is_only_text(tmp_path):
    page = Page(report.write([make_run(tmp_path / "run")]))
    assert EVIL in page.text  # of a legend, a sample: as it was
    assert "<img" not in page.raw and "alert(1)</script>" not in page.raw.replace(
        "&lt;/script&gt;", ""
    )
    series = [s["n"] for d in page.data for s in d.get("s", [])]
    assert EVIL in series and "b/c" in series


def test_charts_carry_the_values(tmp_path):
    page = Page(report.write([make_run(tmp_path / "run")]))
    data = dict(zip(page.titles, page.data, strict=True))
    training, held_out = data["Loss"]["s"]
    assert training["x"] == list(range(1, 41)) and training["y"][:3] == [3, 1.5, 1]
    assert held_out["x"] == [0, 10, 20, 30, 40] and held_out["y"][-1] == 1
    assert [s["y"][-1] for s in data["Tokens by source"]["s"]] == [0.25, 0.75]
    assert data["of its own"]["s"][0]["y"][6] == 1
    heat = data["layer 2"]
    assert heat["rows"] == EXPERTS and len(heat["cols"]) == 40


def test_samples_show_equal_answers_once_and_mark_them(tmp_path):
    page = Page(report.write([make_run(tmp_path / "run")]))
    assert page.raw.count('<span class="no">') == 2 * 3 and page.raw.count('<span class="ok">') == 2
    assert "30 \u2013 40" in page.text


def test_events_are_listed_and_marked(tmp_path):
    page = Page(report.write([make_run(tmp_path / "run")]))
    text = "|".join(page.text)
    assert "10|rewind|spike step 17; spike why the loss" in text and "20|damaged|why" in text
    assert "13|steps not finite|count 2" in text and "2026-03-04 05:06:07" in text
    loss = page.raw[page.raw.index('aria-label="Loss"') :]
    x = 48 + (17 - 0) / 40 * (380 - 10 - 48)
    assert f'<line class="mark" x1="{x:.1f}"' in loss[: loss.index("</svg>")]


def test_the_config_marks_what_is_not_the_default(tmp_path):
    raw = Page(report.write([make_run(tmp_path / "run")])).raw
    marked = re.findall(r'<tr class=set title="([^"]+)">', raw)
    assert marked == [
        *("name", "data.train", "data.weights", "train.steps"),
        *("model.num_layers", "model.num_experts", "model.active_experts"),
    ]
    every = re.findall(r'<tr(?: class=set)? title="([^"]+)">', raw)
    assert len(every) == len(set(every)) > 80 and "optimizer.b1" in every


def test_runs_beside_each_other(tmp_path):
    a, b = make_run(tmp_path / "x/a"), make_run(tmp_path / "x/b", steps=25, scale=0.5)
    with pytest.raises(UserError, match="2 workdirs go on one page: say where, with --out FILE"):
        report.write([a, b])
    page = Page(report.write([a, b], out=tmp_path / "both.html"))
    assert not (a / "report.html").exists()
    loss = page.data[page.titles.index("Loss")]["s"]
    assert [s["n"] for s in loss] == ["a, training", "a, held out", "b, training", "b, held out"]
    assert [s["c"] for s in loss] == [0, 0, 1, 1]
    assert page.titles.count("layer 0") == 2
    marked = re.findall(r'<tr class=set title="([^"]+)">', page.raw)
    assert marked == ["train.steps"]
    same = runs.load([a, tmp_path / "x/../x/b"])
    assert [run.name for run in same] == ["a", "b"]


def test_broken_lines_and_missing_files_are_told_on_the_page(tmp_path):
    workdir = make_run(tmp_path / "run")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo\n[1]\n{"no step": 1}\n\n{"step": 42, "loss": "text"}\n')
        file.write('{"step": 43, "loss": NaN, "expert_load": [[1], [2, 3]]}\n{"step": true}')
    (workdir / "config.json").write_text("{")
    (workdir / "samples.jsonl").unlink()
    (workdir / "events.jsonl").write_bytes(b"\xff\xfe\x00 nothing\n")
    page = Page(report.write([workdir]))
    text = " ".join(page.text)
    assert "metrics.jsonl: left out as no records: lines 46, 47, 48, 52" in text
    assert (
        "config.json can't be read" in text
        and "events.jsonl: left out as no records: line 1" in text
    )
    assert page.data[0]["s"][0]["x"][-1] == 40
    assert "samples" not in page.sections and "config" not in page.sections


def test_an_empty_run_has_a_page_that_says_so(tmp_path):
    (tmp_path / "config.json").write_text(command_line.to_json(Config()))
    page = Page(report.write([tmp_path]))
    text = " ".join(page.text)
    assert "nothing has been logged yet" in text and "metrics.jsonl is missing" in text
    assert not page.figures and page.sections == ["numbers", "config", "go-on"]
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").unlink()
    page = Page(report.write([tmp_path]))
    assert page.sections == ["go-on"] and "config.json is missing" in " ".join(page.text)


def test_a_single_record_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 7, "loss": 0.0, "expert_load": [[1.0, 0.0]]}\n'
    )
    page = Page(report.write([tmp_path]))
    assert page.titles == ["Loss", "layer by expert", "layer 0"]
    assert "nan" not in page.raw.split("</style>")[1].split("<script>")[0].lower()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: WORKDIR"),
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no run in it: there is neither metrics.jsonl nor config.json"),
        (["run", "--out", "no/folder/x.html"], "no/folder/x.html can't be written: No such file"),
        (["run", "--of", "x"], "unrecognized arguments: --of x"),
        (["run", "run"], "2 workdirs go on one page"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        command.main(args)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("**/*.html")) and not list(tmp_path.glob("**/*.tmp"))


def test_the_command_prints_the_path(tmp_path, capsys):
    command.main([str(make_run(tmp_path / "run", steps=2))])
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0 and "--out FILE" in capsys.readouterr().out


# --- DPO and GRPO -----------------------------------------------------------------------------


def write_records(workdir: Path, records: list[dict]) -> Path:
    workdir.mkdir()
    text = "".join(json.dumps({"step": i, **r}) + "\n" for i, r in enumerate(records, 1))
    (workdir / "metrics.jsonl").write_text(text)
    return workdir


def dpo_run(workdir: Path) -> Path:
    names = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
    values = dict(zip(names, (0.75, 1.5, 1.0, -0.5), strict=True))
    held_out = {f"held_out_{name}": value / 2 for name, value in values.items()}
    records = [{"loss": 0.5, **values}, {"held_out_loss": 0.6, **held_out}]
    return write_records(workdir, records)


def grpo_run(workdir: Path, *, rounds: int = 3) -> Path:
    names = ("reward", "reward_std", "groups_alike", "answer_tokens", "cut_off", "clipped")
    values = dict(zip(names, (0.375, 0.5, 0.25, 30.0, 0.125, 0.0), strict=True))
    write_records(workdir, [{"loss": 1e-6, **values}] * rounds + [{"held_out_loss": 1.5}])
    answers = []
    for step in range(1, rounds + 1):
        some = {"step": step, "question": f"question {step} {EVIL}"}
        answers.append({**some, "answer": f"good {step} {EVIL}", "reward": 1.0})
        if step > 1:
            answers.append({**some, "answer": f"poor {step} " + "x" * 9000, "reward": 0.25})
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    (workdir / metrics.ANSWERS).write_text(text)
    return workdir


def test_a_run_on_pairs_leads_with_its_rewards(tmp_path):
    page = Page(report.write([dpo_run(tmp_path / "run")]))
    assert page.titles == ["Reward accuracy", "Reward margin", "Rewards of both sides", "Loss"]
    assert page.sections[:3] == ["numbers", "rewards", "curves"]
    text = "|".join(page.text)
    assert text.index("0.375|reward accuracy, held out") < text.index("held-out loss;")
    assert "0.750|reward margin, held out" in text
    assert "of a pair; ln 2 is no preference" in text and "nats" not in text
    assert [s["n"] for s in page.data[0]["s"]] == ["training", "held out"]
    assert [s["n"] for s in page.data[2]["s"]] == ["chosen", "rejected"]


def test_a_run_on_rewards_leads_with_them_and_shows_its_answers(tmp_path):
    page = Page(report.write([grpo_run(tmp_path / "run")]))
    assert page.titles == [
        *("Reward", "Spread of rewards", "Groups alike", "Answer length", "Answers cut off"),
        *("Training loss", "Held-out loss", "clipped"),
    ]
    text = "|".join(page.text)
    assert text.index("0.375|reward, training") < text.index("held-out loss;")
    assert "25%|of the questions taught nothing" in text
    assert "Training loss| |no measure of what is learnt" in text
    assert "Held-out loss| |nats a token" in text
    assert "answers" in page.sections and f"good 2 {EVIL}" in page.text
    assert "step 2" in page.text and "reward 0.25" in page.text
    assert page.text.count("all answers got this reward") == 1  # of step 1
    assert "characters more]" in text and page.raw.count("x" * 100) > 0
    assert page.raw.index("reward 1<") < page.raw.index("reward 0.25<")


def test_a_long_run_shows_rounds_from_first_to_last(tmp_path):
    path = report.write([grpo_run(tmp_path / "run", rounds=500)])
    page = Page(path)
    steps = [t for t in page.text if re.fullmatch(r"step \d+", t)]
    assert len(steps) == 24 and steps[0] == "step 1" and steps[-1] == "step 500"
    assert "24 of 500 rounds; all rounds are in answers.jsonl" in " ".join(page.text)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (["held_out_loss", "held_out_reward_margin"], "dpo", "of a pair"),  # of step 0 alone
        (["loss", "teacher_kl", "nll"], "distill", "or its mix with nll"),
        (["loss", "groups_alike", "kl"], "grpo", "no measure"),
        (["loss", "held_out_loss"], "sft", "nats"),
    ],
)
def test_what_the_losses_measure_is_true_of_every_run_that_logs_these_numbers(names, kind, words):
    what = headlines.losses_of([dict.fromkeys(names, 0.5)])
    assert what.kind == kind and words in what.training


def test_losses_of_different_objectives_share_no_chart(tmp_path):
    runs_ = [dpo_run(tmp_path / "a"), make_run(tmp_path / "b"), grpo_run(tmp_path / "c")]
    page = Page(report.write(runs_, out=tmp_path / "all.html"))
    losses = {t: d["s"] for t, d in zip(page.titles, page.data, strict=True) if "oss of" in t}
    assert list(losses) == [
        *("Loss of dpo", "Loss of sft", "Training loss of grpo", "Held-out loss of grpo")
    ]
    assert [s["n"] for s in losses["Loss of sft"]] == ["b, training", "b, held out"]


# --- Charts ------------------------------------------------------------------------------------


def test_thinning_keeps_what_sticks_out():
    values = np.sin(np.arange(10_000) / 500)
    values[7_123], values[2_222] = 50.0, -40.0
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS and thinned == sorted(thinned)
    assert (7_123.0, 50.0) in thinned and (2_222.0, -40.0) in thinned
    assert charts.thin(points[:600]) == points[:600]


def test_the_running_mean_is_one():
    points = [(float(i), float(i % 2)) for i in range(400)]
    mean = charts.smooth(points)
    assert mean[0][0] == 0 and mean[-1][0] >= 396 and all(0.4 <= v <= 0.6 for _, v in mean)
    assert charts.smooth(points[:100]) == []


def test_columns_over_time_are_in_proportion():
    records = [(float(s), np.array([s, 2.0 * s])) for s in [*range(0, 500), 999]]
    shown, columns, span = charts.over_time(records)
    assert shown.shape == (2, charts.MAX_COLUMNS) and span == (0.0, 999.0)
    half = charts.MAX_COLUMNS // 2
    np.testing.assert_allclose(shown[0, : half - 1], columns[: half - 1], atol=5)
    np.testing.assert_allclose(shown[1], 2 * shown[0])
    assert shown[0, half + 5] == shown[0, -2] < 500 and shown[0, -1] == 999  # a gap: as before it


def test_values_that_span_decades_have_a_log_axis():
    def note(values, **options):
        line = charts.Line("a", [(float(i), v) for i, v in enumerate(values)])
        return charts.chart("t", [line], **options)

    assert "log scale" in note([100.0, 1.0]) and "log scale" not in note([10.0, 1.0])
    assert "log scale" not in note([100.0, 0.0]) and "log scale" not in note(
        [100.0, 1.0], log=False
    )
    assert "nan" not in note([0.0, 0.0], low=0) and charts.chart("t", []) == ""


# --- A browser ---------------------------------------------------------------------------------

# Moves over every chart, then says what happened in the page's title.
POKE = """<script>
const failed = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const box = svg.getBoundingClientRect();
  const clientX = box.left + box.width * 0.6, clientY = box.top + box.height * 0.5;
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
  const tip = svg.closest("figure").querySelector(".tip");
  const name = svg.getAttribute("aria-label");
  if (!tip || tip.hidden || !/\\d/.test(tip.textContent)) failed.push(name);
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  if (!tip.hidden || box.width < 200) failed.push("left " + name);
}
const search = document.querySelector(".config input[type=search]");
search.value = "NUM_LAYERS";
search.dispatchEvent(new Event("input"));
const rows = [...document.querySelectorAll(".config tbody tr")];
const shown = rows.filter((r) => r.offsetParent).length;
document.documentElement.style.width = "WIDTHpx";
document.body.style.width = "WIDTHpx";
for (const d of document.querySelectorAll("details")) d.open = true;
const wide = document.body.scrollWidth;
document.title = JSON.stringify({failed, shown, wide});
</script></body>"""


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium here")
@pytest.mark.parametrize(("size", "width"), [("1280,1600", 1200), ("500,1600", 340)])
def test_a_browser_shows_it_without_an_error(tmp_path, size, width):
    a, b = make_run(tmp_path / "a", steps=700), make_run(tmp_path / "b")
    path = report.write([a, b], out=tmp_path / "both.html")
    figures = Page(path).figures
    poked = tmp_path / "poked.html"
    poked.write_text(path.read_text().replace("</body>", POKE.replace("WIDTH", str(width))))
    result = subprocess.run(
        [
            *(browser() or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--window-size={size}", poked.as_uri()),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title, result.stdout[:500]
    said = json.loads(title[1])
    assert said["failed"] == [] and said["shown"] == 1 and said["wide"] <= width + 1, said
    assert result.stdout.count('<div class="tip"') == len(figures) > 20


# --- From a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of six steps that was stopped and went on: its workdir, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    chats = write_chats(folder / "a.jsonl", 20)
    held_out = write_chats(folder / "h.jsonl", 5, seed=1)
    args = [
        *(*TINY, "--model.num_layers", "1", "--data.train", str(chats)),
        *("--data.held_out", str(held_out), "--workdir", str(folder / "run")),
        *("--train.eval_every", "2", "--train.eval_questions", "3", "--train.eval_samples", "2"),
        *("--train.profile_start", "2", "--train.profile_steps", "2"),
    ]
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        train.main([*args, "--train.steps", "4", "--optimizer.schedule", "constant"])
        workdir = folder / "run"
        first = (workdir / "samples.jsonl").read_text()
        for name in ("samples", "metrics"):  # as if it had been killed after step 6
            with (workdir / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": 6, "loss": 9.0, "question": "late"}) + "\n")
        train.main([*args, "--train.steps", "6", "--optimizer.schedule", "constant"])
    return workdir, first, printed.getvalue()


@pytest.mark.slow
def test_a_run_leaves_its_page_samples_and_profile(trained):
    workdir, first, printed = trained
    lines = (workdir / "samples.jsonl").read_text()
    assert lines.startswith(first) and "late" not in lines
    samples = [json.loads(line) for line in lines.splitlines()]
    assert [s["step"] for s in samples] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert {tuple(s) for s in samples} == {("step", "question", "expected", "answer", "right")}
    for sample in samples:
        asked = sample["question"].split()
        assert len(asked) == 4 and sample["expected"] == " ".join(sorted(asked))
        assert sample["right"] == (sample["answer"] == sample["expected"])
    assert len({s["question"] for s in samples}) == 2

    page = Page(workdir / "report.html")
    assert {"Loss", "Exact match", "Load entropy", "layer 0"} <= set(page.titles)
    assert page.data[0]["s"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert samples[0]["question"] in page.text
    assert printed.count(f"report      {workdir / 'report.html'}") == 2

    (trace,) = (workdir / "profile").glob("**/*.xplane.pb")
    raw = trace.read_bytes()
    for scope in (b"attention", b"experts", b"router", b"loss", b"optimizer"):
        assert b"/%b/" % scope in raw or b"(%b)" % scope in raw, scope
    assert printed.count("steps recorded: 2") == 1


def test_going_on_takes_out_later_samples(tmp_path):
    sample = {"question": "q", "expected": "e", "answer": "a", "right": False}
    log = metrics.MetricsLog(tmp_path)
    for step in (0, 10, 20):
        log.write_samples(step, [sample, sample | {"answer": step}])
    log.close()
    log = metrics.MetricsLog(tmp_path, step=10)
    log.write_samples(20, [sample])
    log.close()
    there = metrics.read(tmp_path, metrics.SAMPLES)
    assert [(s["step"], s["answer"]) for s in there] == [
        *((0, "a"), (0, 0), (10, "a"), (10, 10)),
        (20, "a"),
    ]
    metrics.MetricsLog(tmp_path).close()  # from the beginning
    assert metrics.read(tmp_path, metrics.SAMPLES) == []


def test_without_held_out_chats_there_are_no_samples(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write_samples(3, [])
    log.close()
    assert not (tmp_path / "samples.jsonl").exists()


def test_answers_without_a_final_message_are_shown_as_they_are():
    encoding = tokenizer.get_tokenizer()
    prompt = harmony.render_prompt([{"role": "user", "content": "one\ntwo"}])
    assert held_out._last_user_text(prompt, encoding) == "one\ntwo"
    raw = encoding.encode("no message at all")
    assert held_out._last_user_text(raw, encoding) == "no message at all"
