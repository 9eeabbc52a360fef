"""A hundred mistakes of a tired user: what was typed, the exit status, and a word that the one message must have.

Commands are typed in a folder with right and wrong models, checkpoints and files. `base` is a small model, `fp8` made of it.
"""

import json
import shlex
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export.calibration import statistics
from megatron_export.cli import commands
from megatron_export.models.statistic_names import hf_keys

from ..support.models import EXAMPLE, GOLDEN, read_json

EXPORT = "export --device cpu --hf-model base"
TEXT = f"{EXPORT} --output new --calib-seq-len 32 --calib-data"
# fmt: off
MISTAKES: tuple[tuple[str, int, str], ...] = (
    # Typed wrongly.
    ("", 2, "COMMAND"),
    ("exprt --output new", 2, "invalid choice: 'exprt'"),
    ("--output new", 2, "COMMAND"),
    ("export", 2, "--output DIR is needed (or --dry-run)"),
    ("export --output", 2, "--output: expected one argument"),
    ("export --ouput new", 2, "Did you mean --output?"),
    ("export --output new --hf_model base", 2, "Did you mean --hf-model?"),
    ("export --output=new --kvcache fp8", 2, "Did you mean --kv-cache?"),
    ("export new", 2, "unrecognized arguments: new"),
    ("plan --hf-model base --calib-data words.txt", 2, "unrecognized arguments: --calib-data"),
    ("plan --word 8", 2, "Did you mean --world?"),
    ("check fp8 --engines vllm", 2, "Did you mean --engine?"),
    ("verify fp8 --refrence base", 2, "Did you mean --reference?"),
    ("diff fp8", 2, "required: B"),
    ("export --output new --format nvpf4", 2, "invalid choice: 'nvpf4'"),
    ("export --output new --format NVFP4", 2, "'nvfp4'"),
    ("export --output new --kv-cache int8", 2, "'nvfp4'"),
    ("export --output new --device gpu", 2, "'cuda', 'cpu'"),
    ("export --output new --writers all-ranks", 2, "'rank0', 'node', 'all'"),
    ("export --output new --group-size 32", 2, "128, 64"),
    ("export --output new --exclude", 2, "--exclude: expected at least one argument"),
    # Numbers that are none.
    ("export --output new --tp two", 2, "--tp: invalid int value: 'two'"),
    ("export --output new --tp 2.0", 2, "--tp: invalid int value: '2.0'"),
    ("export --output new --tp 0", 2, "--tp must be at least 1, not 0"),
    ("export --output new --pp -2", 2, "--pp must be at least 1, not -2"),
    ("export --output new --calib-samples 0", 2, "--calib-samples must be at least 1"),
    ("export --output new --max-shard-size 5XB", 2, "'5XB' is not a size"),
    ("export --output new --max-shard-size 5", 2, "with a unit, like 5GB"),
    ("export --output new --timeout 0", 2, "--timeout must be at least 1 second"),
    ("export --output new --timeout nan", 2, "--timeout must be at least 1 second"),
    ("export --output new --verify --min-snr nan", 2, "--min-snr must be a number, not nan"),
    ("export --output new --iteration 7", 2, "--megatron-checkpoint DIR"),
    ("plan --world 0", 2, "--world must be at least 1, not 0"),
    ("check fp8 --tp 0", 2, "0 is no number of GPUs"),
    ("check fp8 --gpu h1000", 2, "'h100'"),
    ("verify fp8 --reference base --min-snr inf", 2, "--min-snr must be a number, not inf"),
    ("verify fp8 --reference base --text words.txt --max-ppl-ratio -1", 2, "--max-ppl-ratio must be above 0"),
    ("verify fp8 --reference base --text words.txt --windows 1", 2, "--windows must be at least 2"),
    # Flags that contradict one another, or have no effect.
    (f"{EXPORT} --output new --vpp 2", 2, "--vpp 2 needs --pp of at least 2"),
    (f"{EXPORT} --output new --merge-lora", 2, "--merge-lora has no effect without --megatron-checkpoint"),
    (f"{EXPORT} --output new --lora-checkpoint empty", 2, "--lora-checkpoint has no effect"),
    (f"{EXPORT} --output new --load-calibration stats.safetensors --calib-data words.txt", 2, "--calib-data have no effect"),
    (f"{EXPORT} --output new --format bf16 --calib-data words.txt", 2, "--format bf16 needs no calibration"),
    (f"{EXPORT} --output new --format bf16 --save-calibration s.safetensors", 2, "--save-calibration has no effect"),
    (f"{EXPORT} --output new --format fp8 --input-scale 1 --calib-data words.txt", 2, "--format fp8 with --input-scale needs no"),
    (f"{EXPORT} --output new --min-snr 20", 2, "--min-snr has no effect without --verify"),
    (f"{EXPORT} --output new --verify-text words.txt", 2, "--verify-text has no effect without --verify"),
    (f"{EXPORT} --output new --verify --max-ppl-ratio 1.1", 2, "needs --verify-text"),
    (f"{EXPORT} --output new --push-to-hub 'my model'", 2, "like org/name"),
    (f"{EXPORT} --output new --target vllm,tgi", 2, "unknown engine 'tgi'. Known: vllm, sglang, tensorrt_llm"),
    (f"{EXPORT} --output new --target vllm:x", 2, "Write vllm:8"),
    ("check", 2, "give a folder, or --rules"),
    ("check fp8 --version 0.32", 2, "--version needs --engine"),
    ("check fp8 --engine vllm --version main", 2, "--version: 'main' is no release: it has no number"),
    ("verify fp8 --reference base --max-ppl-ratio 1.1", 2, "--max-ppl-ratio needs --text"),
    ("verify fp8 --reference base --windows 4", 2, "--windows needs --text"),
    ("plan --hf-model base --format fp8 --group-size 64", 1, "--group-size has no effect with --format fp8"),
    ("plan --hf-model base --format int4_awq --awq-output modelopt", 1, "it is for nvfp4_awq"),
    ("plan --hf-model base --format bf16 --kv-cache fp8", 1, "Export without it"),
    ("plan --hf-model base --kv-scale 1", 1, "--kv-scale has no effect without --kv-cache"),
    ("plan --hf-model base --format bf16 --exclude '*'", 1, "--exclude has no effect with --format bf16"),
    ("plan --hf-model base --exclude '*.w9'", 1, "--exclude '*.w9' matches no module; they are named like model."),
    ("plan --hf-model base --exclude '*.q_proj'", 1, "q_proj bf16 (--exclude '*.q_proj'); model."),
    ("plan --hf-model base --set '*.q_proj=nvfp4'", 1, "so they must have one format: model.layers.0.self_attn.q_proj nvfp4"),
    ("plan --hf-model base --set '*.w9=nvfp4'", 1, "--set *.w9=nvfp4 matches no module; they are named like model."),
    ("plan --hf-model base --set '*.mlp.*=nvfp5'", 1, "unknown format 'nvfp5'. Did you mean 'nvfp4'?"),
    ("plan --hf-model base --set lm_head=int4_awq", 1, "AWQ has no vector for the output layer"),
    ("plan --hf-model tied --set lm_head=fp8", 1, "output layer is its embedding (tie_word_embeddings), which stays"),
    ("plan --hf-model base --set nvfp4", 1, "write it as GLOB=FORMAT"),
    ("plan --hf-model base --recipe nvfp4_mlp_fp8_atention", 1, "Did you mean 'nvfp4_mlp_fp8_attention'?"),
    ("plan --hf-model base --recipe nvfp4_experts_only", 1, "neither it nor another line of nvfp4 matches a module"),
    ("plan --hf-model base --recipe nowhere.yaml", 1, "nowhere.yaml: not read (No such file or directory)"),
    ("plan --hf-model base --recipe nvfp4_mlp_only --format fp8", 1, "--format has no effect with --recipe"),
    ("plan --hf-model base --format int4_awq --set '*.mlp.*=w4a8_awq'", 1, "int4_awq and w4a8_awq in one recipe"),
    ("plan --hf-model base --exclude '*'", 1, "leaves nothing to quantize"),
    ("plan --hf-model base --quantize-mla", 1, "no latent attention"),
    ("plan --hf-model base --format int4_awq --target vllm", 1, "choose --format fp8, fp8_pb or nvfp4"),
    (f"{EXPORT} --output new --format int4_awq --group-size 64 --target sglang", 1, "SGLang will not load this"),
    # Sizes and ranks.
    (f"{EXPORT} --output new --tp 2", 1, "torchrun --nproc-per-node 2"),
    (f"{EXPORT} --output new --ep 2", 1, "torchrun --nproc-per-node 2"),
    ("export --device cuda --hf-model base --output new", 1, "Use --device cpu"),
    ("plan --hf-model base --tp 3", 1, "num_attention_heads 4 does not divide by --tp 3"),
    ("plan --hf-model base --tp 2 --world 3", 1, "Give 2, or a multiple of it"),
    ("plan --hf-model base --pp 3", 1, "Give fewer"),
    ("plan --hf-model base --ep 2", 1, "this model has no experts. Leave it out"),
    ("plan --hf-model moe --ep 3", 1, "Give a --ep that divides it"),
    ("plan --hf-model base --pp 2 --pp-layout Et|xL", 1, "no letter of Megatron's"),
    ("plan --hf-model base --pp 2 --pp-layout Ett|tL", 1, "this model is EttL"),
    ("plan --hf-model odd --format nvfp4", 1, "blocks of 16 (nvfp4) do not divide"),
    ("plan --hf-model mla --kv-cache fp8", 1, "no scale to export"),
    # Models that are none.
    ("export --device cpu --hf-model bse --output new", 1, "no model folder bse"),
    ("export --device cpu --hf-model base/model.safetensors --output new", 1, "is a file. Give the folder that it is in"),
    ("export --device cpu --hf-model empty --output new", 1, "has no config.json"),
    ("export --device cpu --output new --megatron-checkpoint mcore", 1, "is no checkpoint of Megatron"),
    ("export --device cpu --hf-model mcore --output new", 1, "--megatron-checkpoint mcore"),
    ("export --device cpu --hf-model fp8 --output new", 1, "is quantized already"),
    ("export --device cpu --hf-model broken --dry-run", 1, "broken/config.json: not JSON"),
    ("export --device cpu --hf-model lama --dry-run", 1, "Did you mean 'LlamaForCausalLM'?"),
    ("export --device cpu --hf-model config --output new", 1, "neither model.safetensors nor"),
    ("export --device cpu --hf-model pickled --output new", 1, "Convert it to safetensors"),
    ("export --device cpu --hf-model infinite --output new --format bf16", 1, "NaN or Inf in model.norm.weight"),
    (f"{EXPORT} --output new --megatron-checkpoint mcor", 1, "is no folder"),
    (f"{EXPORT} --output new --megatron-checkpoint base", 1, "an HF model, not a checkpoint of Megatron"),
    (f"{EXPORT} --output new --megatron-checkpoint mcore --iteration 8", 1, "There are iter_0000007"),
    (f"{EXPORT} --output new --megatron-checkpoint legacy", 1, "--ckpt-convert-format torch_dist"),
    # Places that cannot be written.
    (f"{EXPORT} --output taken", 1, "is not empty. Give another --output, or --overwrite"),
    (f"{EXPORT} --output words.txt", 1, "is a file; give a folder"),
    (f"{EXPORT} --output words.txt/new", 1, "so no folder can be made in it"),
    (f"{EXPORT} --output base --overwrite", 1, "base, which this export needs"),
    (f"{EXPORT} --output taken --overwrite --calib-data taken/words.txt", 1, "words.txt, which this export needs"),
    (f"{EXPORT} --output . --overwrite", 1, "which this export needs"),
    (f"{EXPORT} --output /proc/new --format bf16", 1, "/proc"),
    (f"{EXPORT} --output new --save-calibration nowhere/s.safetensors", 1, "in a folder that exists"),
    (f"{EXPORT} --output new --save-calibration new/s.safetensors", 1, "in a folder that exists"),
    (f"{EXPORT} --output new --save-calibration ids.safetensors", 1, "not a calibration file"),
    # Calibration data.
    (f"{EXPORT} --output new --calib-seq-len 512", 1, "--calib-seq-len 512 is more than max_position_embeddings 256"),
    (f"{TEXT} word.txt", 1, "no calibration file word.txt"),
    (f"{TEXT} empty", 1, "no calibration file empty"),
    (f"{TEXT} table.csv", 1, "must be one of .txt, .jsonl, .parquet, .safetensors"),
    (f"{TEXT} blank.txt", 1, "no text in it"),
    (f"{TEXT} short.txt --calib-samples 4", 1, "ask for fewer or shorter samples"),
    (f"{TEXT} binary.txt", 1, "binary.txt"),
    (f"{EXPORT} --output new --calib-data words.txt --calib-samples 4 --calib-seq-len 8", 1, "outside the model's vocabulary"),
    (f"{EXPORT} --output new --calib-data ids.safetensors --calib-samples 4", 1, "3 samples, fewer than --calib-samples 4"),
    (f"{EXPORT} --output new --calib-data base/model.safetensors", 1, "needs an integer tensor `input_ids`"),
    (f"{EXPORT} --output new --load-calibration stat.safetensors", 1, "no calibration file stat.safetensors"),
    (f"{EXPORT} --output new --load-calibration ids.safetensors", 1, "not a calibration file"),
    (f"{EXPORT} --output new --load-calibration stats.safetensors", 1, "measured on another model: its layers is 3, here 2"),
    (f"{EXPORT} --output new --load-calibration words.txt", 1, "words.txt: not a readable safetensors file"),
    # Checkpoints that are none.
    ("check fp9", 1, "fp9 is not a folder"),
    ("check fp8/config.json", 1, "fp8/config.json is not a folder"),
    ("check org/model", 1, "org/model is not a folder"),
    ("check empty", 1, "has no config.json. Give the folder of a checkpoint"),
    ("check config", 1, "Give the folder that has the weights"),
    ("check cut", 1, "cut/model.safetensors: not a readable safetensors file"),
    ("check broken", 1, "broken/config.json"),
    ("verify fp9", 2, "fp9 is not a folder"),
    ("verify fp8", 2, "does not say what it was made from. Give --reference"),
    ("verify fp8 --reference bse", 2, "no model folder bse"),
    ("verify base --reference fp8", 2, "is quantized already"),
    ("verify empty --reference base", 2, "empty: no .safetensors file"),
    ("verify fp8 --reference base --text word.txt", 2, "no text file word.txt"),
    ("verify fp8 --reference base --device cuda", 2, "Use --device cpu"),
    ("verify fp8 --reference base --push-to-hub a/b/c", 2, "like org/name"),
    ("verify fp8 --reference moe_whole", 1, "is missing"),
    ("diff fp8 fp9", 2, "fp9 is not a folder"),
    ("diff fp8 empty", 2, "empty: no .safetensors file"),
    ("diff words.txt fp8", 2, "words.txt is not a folder"),
)
# fmt: on
JUDGED = ("verify fp8 --reference moe_whole",)  # what is wrong is a verdict there


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all of it is typed."""
    place = tmp_path_factory.mktemp("place")
    for name, source in (("base", "llama-bf16"), ("fp8", "llama-FP8-KVFP8"), ("moe_whole", "qwen3moe-bf16")):
        files = [path for path in (GOLDEN / "models" / source).iterdir() if not path.name.startswith("calib")]
        (place / name).mkdir()
        for path in files:
            shutil.copyfile(path, place / name / path.name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / file, place / "base" / file)
    base = read_json(place / "base" / "config.json")
    configs = {
        "config": base,
        "tied": base | {"tie_word_embeddings": True},
        "odd": base | {"intermediate_size": 200},
        "lama": base | {"architectures": ["LamaForCausalLM"]},
        "moe": read_json(place / "moe_whole" / "config.json"),
        "mla": read_json(GOLDEN / "models" / "deepseekv3-bf16" / "config.json"),
        "pickled": base,
        "infinite": base,
        "cut": read_json(place / "fp8" / "config.json"),
    }
    for name, config in configs.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
    damaged = load_file(place / "base" / "model.safetensors")
    damaged["model.norm.weight"][3] = torch.inf
    save_file(damaged, place / "infinite" / "model.safetensors")
    (place / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (place / "cut" / "model.safetensors").write_bytes((place / "fp8" / "model.safetensors").read_bytes()[:100_000])
    for name in ("empty", "broken", "taken", "mcore/iter_0000007", "legacy/mp_rank_00"):
        (place / name).mkdir(parents=True)
    (place / "broken" / "config.json").write_text("{'a': 1}")
    (place / "taken" / "notes.txt").write_text("mine")
    (place / "mcore" / "latest_checkpointed_iteration.txt").write_text("7")
    for name, text in {"words": "several words " * 200, "short": "words", "blank": " \n"}.items():
        (place / f"{name}.txt").write_text(text)
    (place / "binary.txt").write_bytes(struct.pack("<256B", *range(256)))
    (place / "table.csv").write_text("text")
    save_file({"input_ids": torch.ones(3, 8, dtype=torch.int64)}, place / "ids.safetensors")
    deeper = base | {"num_hidden_layers": 3}
    measured = {name: torch.tensor(1.0) for name in hf_keys(deeper)}
    statistics.save(measured, place / "stats.safetensors", deeper)
    return place


def test_there_are_a_hundred_of_them() -> None:
    assert len({typed for typed, _, _ in MISTAKES}) == len(MISTAKES) >= 100


@pytest.mark.parametrize(("typed", "status", "word"), MISTAKES, ids=[typed or "nothing" for typed, _, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_its_status(
    typed: str, status: int, word: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    there = sorted(place.rglob("*"))
    said: list[str] = []
    try:
        found = commands.main(lambda *words, **_: said.append(" ".join(map(str, words))), shlex.split(typed))
    except SystemExit as left:
        found = left.code
    aside = capsys.readouterr().err
    text = "\n".join([*said, aside])
    assert (found, word in text) == (status, True), text
    assert "Traceback" not in text
    assert text.count("error: ") == (typed not in JUDGED), text
    assert sorted(place.rglob("*")) == there
