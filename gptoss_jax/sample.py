"""Answer one prompt: `python -m gptoss_jax.sample --checkpoint DIR --prompt TEXT`.

It streams the answer to stdout, each channel by itself, and prints a summary to stderr. `--json`
prints one JSON object instead, at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from gptoss_jax import harmony
from gptoss_jax.errors import Parser, UserError, command_name, run_entry
from gptoss_jax.harmony import tokenizer

if TYPE_CHECKING:
    import tiktoken

    from gptoss_jax.sampler import Sampler

_DEFAULT_MAX_TOKENS = 1_024
_DATE_HELP = (
    "date in the prompt: none, today or YYYY-MM-DD; default: as in training (data.date of a run, "
    "or the chat template that convert wrote), and today for any other checkpoint; where that "
    "leaves it open (data.date=record, or no run), that of the --messages record"
)


def _parser() -> Parser:
    parser = Parser(command_name("sample"), description="Answer one prompt.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="folder in Hugging Face or OpenAI layout, or workdir",
    )
    add("--step", type=int, help="checkpoint of a workdir; default: its latest")
    add("--base", metavar="DIR", help="base of a LoRA run; default: where it was in training")
    parser.add_ignore_config()
    add("--config", metavar="FILE", help="config of a model that make_model() in FILE builds")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the user says")
    prompt.add_argument(
        "--prompt-ids", metavar="1,2,3", help="token ids to continue, without Harmony"
    )
    prompt.add_argument(
        "--messages",
        metavar="FILE",
        help="a chat to answer: JSON, a list of messages or a record as training reads it",
    )
    add("--tools", metavar="FILE", help="tools that the model may call: JSON, a list of tools")
    add("--raw", action="store_true", help="continue the text of --prompt itself, without Harmony")
    add(
        "--reasoning",
        choices=harmony.EFFORTS,
        help="reasoning effort; default: that of the --messages record, else medium",
    )
    add("--developer", "--system", metavar="TEXT", help="instructions to the model")
    add("--date", metavar="DATE", help=_DATE_HELP)
    _add_rules(parser)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, else bfloat16",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _add_rules(parser: Parser) -> None:
    """Add the options that say how tokens are chosen."""
    add = parser.add_argument
    add(
        "--max-tokens",
        type=int,
        help=f"most tokens to sample; default: all that fit, up to {_DEFAULT_MAX_TOKENS}",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0, the default, takes the most likely token; OpenAI advises 1 for its models",
    )
    add("--top-k", type=int, help="sample from the K most likely tokens; default: all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens of this total probability",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="leave out tokens below this share of the top probability",
    )
    add("--seed", type=int, default=0)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command's arguments."""
    return _parser().parse_args(argv)


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError if an option or an input is wrong."""
    args = parse(argv)
    # Imported late: JAX takes a second, and --help and a misspelt option need not wait for it.
    import jax
    from rich.console import Console

    from gptoss_jax import loading
    from gptoss_jax.config import command_line, dates
    from gptoss_jax.model import Transformer
    from gptoss_jax.ops import moe
    from gptoss_jax.sampler import Rules, Sampler, printing

    rules = Rules(args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    plain = args.raw or args.prompt_ids is not None
    for name in ("developer", "date", "tools", "reasoning"):
        if plain and getattr(args, name) is not None:
            raise UserError(f"--{name} is for a Harmony prompt: leave --raw and --prompt-ids out")
    if args.date is not None:
        dates.check(args.date, field="--date", rules=("none", "today"))
    if args.raw and args.prompt is None:
        raise UserError("--raw is for the text of --prompt; --prompt-ids are taken as they are")
    chat = {} if plain else read_chat(args)
    given = None if args.prompt_ids is None else _read_ids(args.prompt_ids)

    make_model = command_line.read_make_model(args.config) if args.config else None
    on_cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    model, params = loading.load(
        args.checkpoint,
        dtype=dtype,
        step=args.step,
        base=args.base,
        split=on_cpu,
        layout=moe.layout_for_chip(),
        ignore_config=args.ignore_config,
        make_model=make_model or Transformer,
    )
    encoding = tokenizer.get_tokenizer(model.config.vocab_size)
    ids = read_prompt(args, chat, encoding) if given is None else given
    room = model.config.context - len(ids)
    options: dict[str, Any] = {
        "max_tokens": max(1, min(room, _DEFAULT_MAX_TOKENS))
        if args.max_tokens is None
        else args.max_tokens,
        "temperature": rules.temperature,
        "top_k": rules.top_k,
        "top_p": rules.top_p,
        "min_p": rules.min_p,
        "seed": args.seed,
    }
    sampler = Sampler(model, params)
    if args.json:
        print(json.dumps(_answer(sampler, ids, options, encoding=encoding, chat=chat)))
        return
    stream = printing.Clocked(sampler.stream(ids, **options))
    console = Console(highlight=False, markup=False, emoji=False)
    show = printing.print_text if plain else printing.print_channels
    show(console, stream, encoding=encoding)
    Console(stderr=True, highlight=False).print(stream.summary(), style="dim")


def _answer(
    sampler: Sampler,
    ids: list[int],
    options: dict[str, Any],
    *,
    encoding: tiktoken.Encoding,
    chat: dict[str, Any],
) -> dict[str, Any]:
    """Return what `--json` prints; it has `messages` and `irregular` only after a Harmony prompt.

    `chat` is that of the prompt, {} for another prompt. `irregular` says whether a header is not as
    Harmony writes it, but its meaning is clear.
    """
    out = sampler.generate([ids], **options)
    answer: dict[str, Any] = {
        "prompt_ids": ids,
        "ids": out.tokens[0],
        "text": tokenizer.decode(encoding, out.tokens[0]),
        "logprobs": out.logprobs[0],
        "tokens_per_second": out.tokens_per_second,
    }
    if chat:
        parsed = harmony.parse(out.tokens[0], encoding)
        answer["messages"] = harmony.to_messages(parsed, tools=chat.get("tools"))
        answer["irregular"] = any(m.header.irregular for m in parsed)
    return answer


def read_prompt(
    args: argparse.Namespace, chat: dict[str, Any], encoding: tiktoken.Encoding
) -> list[int]:
    """Return the ids of the prompt, with the date and history that the checkpoint was trained on.

    A date of --messages that is not used is named on stderr. Raises UserError as
    `loading.read_rules`.
    """
    from gptoss_jax import loading
    from gptoss_jax.config import dates

    if args.raw:
        return tokenizer.encode(encoding, args.prompt)
    rules = loading.read_rules(args.checkpoint, step=args.step)
    date = args.date or rules.date_of(chat.get("date"))
    if args.date is None and chat.get("date") not in (None, date):
        why = f"the checkpoint was trained with data.date {rules.date}"
        print(f"{args.messages}: not used: date ({why})", file=sys.stderr)
    return harmony.render_prompt(
        chat["messages"],
        tools=chat.get("tools"),
        reasoning=args.reasoning or chat.get("reasoning") or "medium",
        date=dates.in_prompt(date),
        history=rules.history,
        tokenizer=encoding,
    )


def read_chat(args: argparse.Namespace) -> dict[str, Any]:
    """Return the chat that the options give: its messages, tools, reasoning effort and date.

    Columns of --messages that nothing reads are named on stderr.
    """
    from gptoss_jax.data import chat_file  # imported late, as in main

    if args.messages is not None:
        chat, unused = chat_file.read(args.messages, args.tools)
        if unused:
            print(f"{args.messages}: not read: {', '.join(unused)}", file=sys.stderr)
    else:
        tools = [] if args.tools is None else chat_file.read_tools(args.tools)
        chat = {"messages": [{"role": "user", "content": args.prompt}], "tools": tools}
    if args.developer is not None:
        if chat["messages"][0]["role"] in ("developer", "system"):
            raise UserError(f"{args.messages} has instructions, and --developer others: give one")
        developer = {"role": "developer", "content": args.developer}
        chat["messages"] = [developer, *chat["messages"]]
    harmony.check(chat["messages"], chat.get("tools"))
    return chat


def _read_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--prompt-ids is {text!r}: it takes whole numbers with commas between, such as 1,2,3"
        ) from None


if __name__ == "__main__":
    run_entry(main)
