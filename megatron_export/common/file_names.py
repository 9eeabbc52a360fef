"""The names of a checkpoint's files that are not its weights."""

CONFIG = "config.json"
QUANT_CONFIG = "hf_quant_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "export_manifest.json"
RECIPE = "recipe.yaml"  # what a budget chose
