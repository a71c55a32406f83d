"""The reward of configs/tiny_grpo.py: whether a sum is right.

`python configs/rewards/sums.py` writes the questions that it is for, with the right answers;
`python configs/rewards/sums.py shy` the chats that its model is taught by first, in which each of
these is answered once with the sum and once with "no idea".
"""

from __future__ import annotations

import json
import sys
from typing import Any

LARGEST = 4  # of the two that are added


def reward(answer: Any, record: dict[str, Any]) -> float:
    """Return 1 for the right sum, and 0 for any other answer and for one that breaks off."""
    return float(answer.finished and answer.final == record["messages"][-1]["content"])


def questions(*, shy: bool = False) -> list[dict[str, Any]]:
    """Return all sums as chats."""
    numbers = range(LARGEST + 1)
    sums = [(f"{a} + {b}", str(a + b)) for a in numbers for b in numbers]
    return [_chat(q, said) for q, right in sums for said in (right, *["no idea"] * shy)]


def _chat(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "reasoning": "low"}


if __name__ == "__main__":
    chats = questions(shy="shy" in sys.argv[1:])
    sys.stdout.writelines(json.dumps(chat) + "\n" for chat in chats)
