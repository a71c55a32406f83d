"""transformers' side of `benchmarks/train.py`, with PEFT where adapters are tuned.

Run by it, in a process of its own. Float experts, since transformers trains no packed ones: of the
same values on a CPU, random on a device.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
THREADS = len(os.sched_getaffinity(0))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(THREADS))
os.environ["JAX_PLATFORMS"] = "cpu"  # the device is torch's here

import peft  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
import train_cases  # noqa: E402
import transformers  # noqa: E402  # pyright: ignore[reportMissingImports]
from train_cases import EXPERTS, SIZES, Case  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", type=int, required=True)
    parser.add_argument("--form", required=True, help="of its experts: eager, grouped_mm")
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    case = train_cases.choose(arguments.case, device=arguments.device, tiny=arguments.tiny)
    folder = arguments.weights / "dense" if arguments.weights else None
    train_cases.serve(*side(case, arguments.form, folder))


def make(case: Case, form: str, folder: Path | None, device: str) -> Any:
    """Return the model, its attention the one of its forms that knows sinks and trains anywhere."""
    forms: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": form}
    dtype = getattr(torch, case.dtype)
    if folder is not None:
        model = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=dtype, **forms)
        return model.to(device)
    c = SIZES[case.size]
    config = transformers.GptOssConfig(
        vocab_size=c.vocab_size, num_hidden_layers=c.num_layers, hidden_size=c.d_model,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
        num_local_experts=c.num_experts, num_experts_per_tok=c.active_experts,
        intermediate_size=c.d_expert, sliding_window=c.window, **forms,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.GptOssForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def adapt(model: Any, case: Case) -> Any:
    """Put PEFT's adapters beside the weights that the case names, with its defaults elsewhere."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=case.rank,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=experts if case.targets == EXPERTS else None,
        ),
    )


def side(case: Case, form: str, folder: Path | None) -> tuple[Any, Any, Any]:
    """Return what `train_cases.serve` takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = train_cases.status("VmRSS")
    there: dict[str, Any] = {}

    def step() -> float:
        model, optimizer, ids = there["model"], there["optimizer"], there["ids"]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(there["trained"], 1.0)
        optimizer.step()
        return float(loss.detach())  # waits for it

    def begin() -> dict[str, Any]:
        model = make(case, form, folder, device)
        if case.remat != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if case.targets:
            model = adapt(model, case)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        there["model"], there["trained"] = model, trained
        there["optimizer"] = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        there["ids"] = torch.as_tensor(train_cases.token_ids(case), dtype=torch.long, device=device)
        loss = step()
        step()
        train_cases.forget_peak()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        return {"loss": loss, "trained": sum(p.numel() for p in trained), **versions}

    def peak() -> dict[str, Any]:
        if device == "cuda":
            return {"peak bytes": torch.cuda.max_memory_allocated(), "of which libraries": 0}
        return {"peak bytes": train_cases.status("VmHWM"), "of which libraries": before}

    return begin, step, peak


if __name__ == "__main__":
    main()
