"""The date of a prompt: what `data.date` means in training, in prompts and in the template."""

import dataclasses
from types import SimpleNamespace

import pytest

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, command_line, dates
from gptoss_jax.errors import UserError
from gptoss_jax.runs import records
from gptoss_jax.training import setup

DAY = "2031-02-03"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(dates, "today", lambda: DAY)


@pytest.mark.parametrize(
    ("rule", "in_training", "in_prompt", "in_template"),
    [
        ("none", None, None, "none"),
        ("today=2024-01-31", "2024-01-31", DAY, "today"),
        ("today", DAY, DAY, "today"),
        ("record", "2020-02-02", DAY, "today"),
        ("2024-01-31", "2024-01-31", "2024-01-31", "2024-01-31"),
    ],
)
def test_what_a_rule_means(rule, in_training, in_prompt, in_template):
    assert dates.in_training(rule, "2020-02-02") == in_training
    assert dates.in_prompt(rule) == in_prompt
    assert dates.of_template(rule) == in_template
    assert dates.in_training("record") is None


@pytest.mark.parametrize("bad", ["", "now", "2024-1-31", "2024-02-30", "20240131", "today=x"])
def test_no_rule_and_no_day_is_refused(bad):
    with pytest.raises(UserError, match=r"data\.date is .*none, today, record, or a day"):
        DataConfig(date=bad)


def test_a_resumed_run_writes_the_day_on_which_it_began(monkeypatch):
    config = Config(data=DataConfig(date="today"))
    monkeypatch.setattr(records, "newest_record", lambda workdir: None)
    first = setup.with_day(config)
    assert first.data.date == f"today={DAY}"
    again = command_line.from_json(command_line.to_json(first), where="config.json")
    assert again == first
    monkeypatch.setattr(dates, "today", lambda: "2031-02-04")
    monkeypatch.setattr(records, "newest_record", lambda workdir: SimpleNamespace(config=again))
    assert setup.with_day(config) == first
    other = dataclasses.replace(config, data=DataConfig(date="2024-01-31"))
    assert setup.with_day(other) == other


def test_the_fingerprint_has_a_date_only_if_there_is_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    config = DataConfig(train=(str(tmp_path / "a.jsonl"),))
    one, two = (
        data.fingerprint(Config(data=dataclasses.replace(config, date=rule)))
        for rule in ("none", f"today={DAY}")
    )
    assert "data.date" not in one["settings"]
    assert data.differences(one, two) == [f"data.date was not given, is today={DAY}"]
