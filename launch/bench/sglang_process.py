"""One checkpoint in a real SGLang, in processes of its own: what SGLang is given, and what is read in its log.

    python launch/bench/sglang_process.py < request > answer

The request is a JSON object with the arguments of `served`; the answer is the last line that is printed, after MARK. An engine
whose scheduler fails ends the process that started it, so that one is started by another, which reads what it left behind.
Imports nothing of this repository but the prompt that vLLM is given too.
"""

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from tempfile import TemporaryFile
from typing import Any

from vllm_process import MARK, PROMPT, TOKENS

STEP = "STEP "
SETTINGS = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
HOW = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.3,  # others may share the GPU; the next line bounds what is taken of it
    "max_total_tokens": 1 << 15,
    "max_running_requests": 32,
    "enable_multimodal": False,  # text alone, so that no processor of images is looked for
    "skip_server_warmup": True,
    "log_level": "info",
}
CPU = {"device": "cpu", "attention_backend": "torch_native"}
PREFIX = re.compile(r"^\[[^\]]*\]\s*|^[\d\-: ,.]+(?=[A-Z])")  # time and rank before a line of its log
WARNED = re.compile(r"warn|not found|missing|not initialized|uninitialized", re.I)
CHOSE = re.compile(r"kernel|backend|marlin|gemm|moe_runner|KV Cache|quantization", re.I)
QUIET = re.compile(r"Ignore import error|server_args=|ServerArgs\(|Prefill batch|Decode batch")
RAISED = re.compile(r"\w*(Error|Exception)\b.*: ?\S")


def served(folder: str, windows: list[list[int]], attention: str | None = None, tp: int = 1) -> dict[str, Any]:
    """What becomes of a checkpoint.

    windows    ids of a text in rows of one length; may be empty
    attention  a backend of SGLang's by its name, in place of the one that it would take
    tp         how many GPUs share each layer

    Returns `version` and `device`; `tokens`, the first greedy ones after PROMPT; `losses`, the mean negative log-likelihood of
    each window's tokens after its first; `error` in place of these two; `warned` and `chose`, lines of SGLang's log.
    """
    request = {"folder": folder, "windows": windows, "attention": attention, "tp": tp}
    with TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, __file__, "--inside"]
        done = subprocess.run(command, input=json.dumps(request), stdout=log, stderr=subprocess.STDOUT, text=True)
        log.seek(0)
        lines = log.read().splitlines()
    answer: dict[str, Any] = {"version": version("sglang"), "device": "", "error": None}
    for line in lines:
        answer |= json.loads(line.removeprefix(STEP)) if line.startswith(STEP) else {}
    said = [
        PREFIX.sub("", line).strip()[:300] for line in lines if not line.startswith(STEP) and not QUIET.search(line)
    ]
    if answer["error"] is None and not answer.get("tokens"):
        raised = [text for text in said if RAISED.match(text)]
        answer["error"] = (raised or [f"exit status {done.returncode}; its last words: {' '.join(said[-5:])}"])[-1]
    warned = dict.fromkeys(text for text in said if WARNED.search(text))
    chose = dict.fromkeys(text for text in said if CHOSE.search(text) and text not in warned)
    return answer | {"warned": list(warned), "chose": list(chose)}


def inside(folder: str, windows: list[list[int]], attention: str | None, tp: int) -> None:
    """Start SGLang on a checkpoint, and tell each thing about it in a line after STEP as soon as it is known."""
    import sglang
    import torch

    gpu = torch.cuda.is_available()
    tell(device=torch.cuda.get_device_name() if gpu else "CPU")
    how = HOW | ({} if gpu else CPU) | ({"attention_backend": attention} if attention else {})
    engine = sglang.Engine(model_path=folder, tp_size=tp, port=free_port(), nccl_port=free_port(), **how)
    scored = {"return_logprob": True, "logprob_start_len": 0}
    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answer = engine.generate(input_ids=PROMPT, sampling_params=greedy, **scored)
    tokens, steps = answer["output_ids"][-TOKENS:], answer["meta_info"]["output_token_logprobs"]
    if not all(step[0] > -1e9 for step in steps):  # NaN is not greater
        raise ArithmeticError(f"the tokens {tokens} have probabilities that are no numbers")
    once = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    answers = engine.generate(input_ids=windows, sampling_params=once, **scored) if windows else []
    losses = [_loss(row, one["meta_info"]["input_token_logprobs"]) for row, one in zip(windows, answers, strict=True)]
    tell(tokens=tokens, losses=losses)


def free_port() -> int:
    """A port of this machine that nobody listens on: engines that start together would take the same ones."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def tell(**what: Any) -> None:
    """A line for the process outside."""
    print(f"\n{STEP}{json.dumps(what)}", flush=True)


def _loss(row: list[int], steps: list) -> float:
    """Of one window: nothing predicts its first token."""
    found = [value for value, token, *_ in steps if value is not None]
    if [token for value, token, *_ in steps if value is not None] != row[1:]:
        raise ValueError(
            f"{len(found)} log-probabilities, not those of the {len(row) - 1} tokens after a window's first"
        )
    return -sum(found) / len(found)


def main() -> None:
    """Answer one request."""
    os.environ |= SETTINGS
    request = json.loads(sys.stdin.read())
    if "--inside" not in sys.argv:
        print(f"\n{MARK}{json.dumps(served(**request))}", flush=True)
        return
    try:
        inside(**request)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
        tell(error=f"{type(error).__name__}: {error}"[:1500])
    os._exit(0)  # what an engine leaves running is not waited for


if __name__ == "__main__":
    main()
