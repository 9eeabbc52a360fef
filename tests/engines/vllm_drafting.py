"""A base and its drafts in a real vLLM on a CPU, each of which generates greedily; a JSON line about each.

    python -m tests.engines.vllm_drafting [--prompts JSON] [--steps N] BASE DRAFT...

The first line is about the base alone, with `tokens`, those of each prompt. The line of a draft has beside them how many tokens it
`drafted`, and how many of these the base `accepted`. Only arithmetic that the CPU build lacks is replaced, as in
launch/bench/vllm_process.py.
"""

import argparse
import json
import os

from launch.bench.vllm_process import HOW, SETTINGS, emulate

PROMPTS = [[1, 5, 9, 77, 200, 31, 400, 8], [3, 300, 41, 6], [90, 12, 480, 33, 33, 7]]
TOKENS = 48
COUNTED = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def generated(base: str, draft: str | None, steps: int, prompts: list[list[int]]) -> dict:
    """What a base writes after each prompt, with a draft or without. Raises what vLLM raises."""
    from vllm import LLM, SamplingParams

    asked = {"method": "eagle3", "model": draft, "num_speculative_tokens": steps}
    llm = LLM(
        model=base,
        max_model_len=128,
        max_num_seqs=4,
        disable_log_stats=False,
        **({"speculative_config": asked} if draft else {}),
        **HOW,
    )
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTED.values()}
    found = {said: counts[name] for said, name in COUNTED.items() if name in counts}
    return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers], **found}


def main() -> None:
    """The base alone, then with each draft."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=json.loads, default=PROMPTS, help="ids of each, as JSON")
    parser.add_argument("--steps", type=int, default=3, help="tokens that a draft is asked for at a time")
    parser.add_argument("folders", nargs="+", help="the base, and drafts")
    flags = parser.parse_args()
    base, *drafts = flags.folders
    for draft in (None, *drafts):
        try:
            said = generated(base, draft, flags.steps, flags.prompts) | {"error": None}
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"folder": draft or base} | said), flush=True)


if __name__ == "__main__":
    os.environ |= SETTINGS
    emulate()
    main()
    os._exit(0)  # what an engine leaves running is not waited for
