"""One file per architecture, and what they share: names, layouts, shapes, settings."""

from .architecture import Architecture
from .awq_mappings import feeders_of, other_readers_of, reads_heads, vector_home
from .canonical_names import canonical, without_additions
from .drafts import KINDS, Kind, canonical_in, child_of, draft_config, draft_kind, of_linear
from .hf_config import architecture_of, shape_of
from .medusa import HEADS, config_with_heads, format_problems, ignored, spelled
from .megatron_parameters import HEAD, cut_of, is_expert, is_linear_weight, makes_keys, pooled
from .predicting import is_beyond, is_mtp, keeps_keys, mtp_prefixes, without_mtp
from .registry import ARCHITECTURES, known
from .sources import Source, Stack, copied_prefixes, head_of, parameters_of, shared_tensors
from .transformer_config import Rope, check_computed, megatron_llama3, rope_of, settings_of, unscaled_rope_settings
