"""A run's rules for history and date: what is exported, and what `sample` asks with, agree."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_checkpoint import small_model

from gptoss_jax import convert as command
from gptoss_jax import harmony, loading, sample, weights
from gptoss_jax.config import Config, DataConfig, LoRAConfig, dates
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import get_tokenizer
from gptoss_jax.loading.convert import convert
from gptoss_jax.runs import checkpoints
from gptoss_jax.types import TrainState

DAY, FIXED = "2031-02-03", "2024-01-31"
ENCODING = get_tokenizer(300)
OTHER = "{{ messages[0].content }}"  # a template that is not ours


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(dates, "today", lambda: DAY)


def make_run(workdir: Path, *, lora: bool = False, **data) -> Path:
    """Write the checkpoint of a run with these fields of `data`."""
    options = {"lora": LoRAConfig(targets=("attention",), rank=2)} if lora else {}
    model, params = small_model(vocab_size=300, **options)
    config = Config(model=model.config, init="random", data=DataConfig(sequence_length=64, **data))
    state = TrainState(
        step=jnp.asarray(1),
        params=params,
        opt_state={"count": jnp.zeros(())},
        rng=jax.random.key(0),
    )
    manager = checkpoints.open_manager(workdir, keep=1)
    checkpoints.save(manager, state, config=config, data_state={}, fingerprint={})
    manager.wait_until_finished()
    manager.close()
    return workdir


def date_of_prompt(folder: Path, *options: str) -> str | None:
    """Return the date that `sample` names in its prompt."""
    asked = [] if "--messages" in options else ["--prompt", "hi"]
    arguments = ["--checkpoint", str(folder), *asked, *options]
    args = sample.parse(arguments)
    ids = sample.read_prompt(args, sample.read_chat(args), ENCODING)
    _, found, rest = ENCODING.decode(ids).partition("Current date: ")
    return rest.partition("\n")[0] if found else None


RULES = [
    ({}, "none", None),
    ({"history": "template", "date": "today=2030-12-31"}, "today", DAY),
    ({"date": "record"}, "today", DAY),
    ({"date": FIXED}, FIXED, FIXED),
]


@pytest.mark.parametrize(("data", "in_template", "in_prompt"), RULES)
def test_a_run_and_its_exports_ask_as_it_was_trained(data, in_template, in_prompt, tmp_path):
    run = make_run(tmp_path / "run", **data)
    history = data.get("history", "harmony")
    expected = harmony.chat_template(history=history, date=in_template)
    assert loading.read_rules(run) == (history, data.get("date", "none"))
    convert(run, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "openai", to="openai")
    convert(tmp_path / "openai", tmp_path / "again", to="hf")
    model, params = small_model(vocab_size=300)
    weights.save(tmp_path / "saved", model, params, template=loading.read_rules(run).template())
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == expected
    for folder in (run, tmp_path / "hf", tmp_path / "openai", tmp_path / "again"):
        if folder != run:
            assert (folder / "chat_template.jinja").read_text() == expected
            assert loading.read_rules(folder) == (history, in_template)
        assert date_of_prompt(folder) == in_prompt
        assert date_of_prompt(folder, "--date", "2020-02-02") == "2020-02-02"
        assert date_of_prompt(folder, "--date", "none") is None


@pytest.mark.parametrize(
    ("rule", "used"),
    [
        ("record", True),
        (None, True),  # no run
        ("none", False),
        ("today=2030-12-31", False),
        (FIXED, False),
    ],
)
def test_a_record_s_own_date_is_used_or_said_not_to_be(rule, used, tmp_path, capsys):
    """Where training took it, or no run says what it took; other columns are named, too."""
    if rule is None:
        weights.save(tmp_path / "c", *small_model(vocab_size=300), to="openai")
    else:
        make_run(tmp_path / "c", date=rule)
    messages, file = [{"role": "user", "content": "hi"}], tmp_path / "chat.json"
    options = ["--messages", str(file)]
    file.write_text(json.dumps({"messages": messages, "date": "2019-05-04", "source": "web"}))
    other = {"none": None, FIXED: FIXED}.get(rule, DAY)
    assert date_of_prompt(tmp_path / "c", *options) == ("2019-05-04" if used else other)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{file}: not read: source"
    trained = f"the checkpoint was trained with data.date {rule}"
    assert said[1:] == ([] if used else [f"{file}: not used: date ({trained})"])
    assert date_of_prompt(tmp_path / "c", *options, "--date", "2020-02-02") == "2020-02-02"
    assert "not used" not in capsys.readouterr().err
    file.write_text(json.dumps({"messages": messages, "date": "4 May"}))
    assert date_of_prompt(tmp_path / "c", *options) == other
    assert capsys.readouterr().err == f"{file}: not read: date\n"


def test_a_checkpoint_that_is_not_ours_keeps_its_template_and_gets_today(tmp_path, capsys):
    model, params = small_model(vocab_size=300)
    weights.save(tmp_path / "theirs", model, params)
    assert date_of_prompt(tmp_path / "theirs") is None  # by our template, until it is replaced
    (tmp_path / "theirs" / "chat_template.jinja").write_text(OTHER)
    assert date_of_prompt(tmp_path / "theirs") == DAY
    assert date_of_prompt(tmp_path / "theirs", "--date", "today") == DAY
    for name, option in (("copy", "--experts=bf16"), ("same", "--to=hf")):
        command.main([str(tmp_path / "theirs"), str(tmp_path / name), "--to", "hf", option])
        assert (tmp_path / name / "chat_template.jinja").read_text() == OTHER
        assert capsys.readouterr().out.endswith("\nchat template: copied\n")
    weights.save(tmp_path / "original", model, params, to="openai")
    assert date_of_prompt(tmp_path / "original") == DAY
    command.main([str(tmp_path / "original"), str(tmp_path / "hf"), "--to", "hf"])
    assert capsys.readouterr().out.endswith(
        "ours (earlier analysis by the rule harmony; today's date)\n"
    )
    assert date_of_prompt(tmp_path / "hf") == DAY
    old = "{#- Harmony prompts, as gptoss_jax.harmony renders them -#}"  # exported before rules
    (tmp_path / "hf" / "chat_template.jinja").write_text(old)
    assert loading.read_rules(tmp_path / "hf") == ("harmony", "none")


def test_adapters_bring_the_template_of_their_run(tmp_path, capsys):
    run = make_run(tmp_path / "run", lora=True, history="template", date=FIXED)
    command.main([str(run), str(tmp_path / "peft"), "--to", "peft"])
    said = f"chat template: ours (earlier analysis by the rule template; the date {FIXED})\n"
    assert capsys.readouterr().out.endswith(said)
    weights.save(tmp_path / "base", *small_model(vocab_size=300))
    (tmp_path / "base" / "chat_template.jinja").write_text(OTHER)
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": OTHER}))
    options = ["--to", "hf", "--adapters", str(tmp_path / "peft")]
    command.main([str(tmp_path / "base"), str(tmp_path / "merged"), *options])
    assert capsys.readouterr().out.endswith(said)
    expected = harmony.chat_template(history="template", date=FIXED)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == expected
    assert "chat_template" not in json.loads((tmp_path / "merged" / file.name).read_text())


@pytest.mark.parametrize("bad", ["record", "yesterday", "today=2024-01-31"])
def test_a_date_that_no_prompt_has_is_refused(bad):
    with pytest.raises(UserError, match=r"--date is .*: it is one of none, today, or a day"):
        sample.main(["--checkpoint", "x", "--prompt", "hi", "--date", bad])
    with pytest.raises(UserError, match="--date is for a Harmony prompt"):
        sample.main(["--checkpoint", "x", "--prompt", "hi", "--raw", "--date", "none"])
