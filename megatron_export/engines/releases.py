"""Since which release an engine reads what of our formats: `check --version` decides by this, and docs/engines.md shows it."""

from dataclasses import dataclass

from .checks import release_of


@dataclass(frozen=True)
class Change:
    """The first release with it, which was read; what it is, and whether runs of an earlier and a later release have shown it."""

    since: str
    says: str
    seen: bool = False


SEEN = True
# fmt: off
CHANGES: dict[str, dict[str, Change]] = {
    "vllm": {
        "mixed alone":                  Change("0.33", "hf_quant_config.json alone serves a mixed model", SEEN),
        "other key":                    Change("0.33", "`exclude_modules` in config.json counts where `ignore` is not there", SEEN),
        "no Medusa":                    Change("0.33", "Medusa is gone", SEEN),
    },
    "sglang": {
        "NVFP4_AWQ":                    Change("0.5.17", "NVFP4_AWQ"),
        "MXFP8 in a mix":               Change("0.5.17", "MXFP8 in a mixed model"),
        "MXFP8":                        Change("0.5.18", "MXFP8 as the format of a whole model", SEEN),
        "FP8_PB_WO in a mix":           Change("0.5.18", "FP8_PB_WO in linears of a mixed model"),
        "W4A16_NVFP4":                  Change("0.5.19", "W4A16_NVFP4 as the format of a whole model", SEEN),
        "FP8 in shared experts":        Change("0.5.19", "FP8 in the shared experts of DeepSeek", SEEN),
        "FP8_BLOCK_SCALES in a mix":    Change("0.5.20", "FP8_BLOCK_SCALES in a mixed model"),
        "FP8_PB_WO of experts in a mix": Change("0.5.21", "FP8_PB_WO in experts of a mixed model"),
        "no swiglu_limit":              Change("0.5.22", "GPT-OSS without `swiglu_limit` in config.json", SEEN),
        "other key of NVFP4":           Change("0.5.23", "`exclude_modules` in config.json of NVFP4, without `ignore`", SEEN),
    },
    "tensorrt_llm": {
        "NVFP4_AWQ":                    Change("1.3", "NVFP4_AWQ"),
        "W4A16_NVFP4":                  Change("1.3", "W4A16_NVFP4"),
        "MXFP8":                        Change("1.3", "MXFP8"),
        "FP8_PB_WO":                    Change("1.3", "FP8_PB_WO in capitals: before, in small letters alone"),
    },
}
# fmt: on


def has(engine: str, change: str, version: str) -> bool:
    """Whether a release has a change, by its name in `CHANGES`."""
    return release_of(version) >= release_of(CHANGES[engine][change].since)
