"""Harmony's system message, and the chat template that servers read, which writes the same one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.channels import CHANNELS, HISTORIES

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
BUILTIN_TOOLS = ("browser", "python")  # tools that the models know by themselves

_VOCAB = Path(__file__).parent / "vocab"
_TEMPLATE = _VOCAB / "chat_template.jinja"
_RULES = '{%- set history_rule = "harmony" -%}\n{%- set date_rule = "none" -%}\n'


def system_text(
    reasoning: str,
    date: str | None,
    *,
    functions: bool,
    identity: str | None = None,
    builtin_tools: Sequence[str] = (),
) -> str:
    """Return the system message, as openai-harmony 0.0.8 writes it.

    `functions` says whether function tools are declared. `builtin_tools` has names of
    `BUILTIN_TOOLS`, in any order. Raises UserError for another name.
    """
    for name in builtin_tools:
        if name not in BUILTIN_TOOLS:
            raise UserError(f"builtin_tools has {name!r}: it takes {', '.join(BUILTIN_TOOLS)}")
    lines = [IDENTITY if identity is None else identity, f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}"]
    if date is not None:
        lines.append(f"Current date: {date}")
    lines += ["", f"Reasoning: {reasoning}", ""]
    if builtin_tools:
        lines += ["# Tools", ""]
        for name in (name for name in BUILTIN_TOOLS if name in builtin_tools):
            lines += [_describe(name), ""]
    lines.append(
        f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    )
    if functions:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    return "\n".join(lines)


@cache
def _describe(builtin_tool: str) -> str:
    """Return the text that describes a built-in tool to the model."""
    return (_VOCAB / f"{builtin_tool}_tool.txt").read_text(encoding="utf-8").rstrip("\n")


def template_rules(text: str) -> tuple[str, str] | None:
    """Return `history` and `date` of a template by `chat_template`; None for any other template."""
    found = re.search(_RULES.replace('"harmony"', '"(.*)"').replace('"none"', '"(.*)"'), text)
    if found is not None:
        return found[1], found[2]
    return ("harmony", "none") if "gptoss_jax.harmony" in text else None  # one of before had none


def chat_template(*, history: str = "harmony", date: str = "none") -> str:
    """Return the chat template (Jinja) that renders as `harmony.render_prompt` does.

    It goes into a checkpoint's folder, where servers read it. Without a generation prompt it
    renders as `harmony.render`. `history` is the rule of `harmony.render_prompt`. `date` is what it
    writes if it is not given a date: "none", "today", or a day as YYYY-MM-DD.
    """
    if history not in HISTORIES:
        raise UserError(f"history is {history!r}: it is one of {', '.join(HISTORIES)}")
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name in BUILTIN_TOOLS:
        text = text.replace(f"{name.upper()}_TOOL", _describe(name))
    rules = _RULES.replace('"harmony"', f'"{history}"').replace('"none"', f'"{date}"')
    assert _RULES in text
    return text.replace(_RULES, rules)
