"""The draft that ModelOpt puts into a Megatron-Core model, on its last pipeline stage: its settings and its shards."""

from dataclasses import dataclass

from torch import nn

from ..common.errors import report
from ..common.shards import Shards
from ..models import Kind, canonical_in, child_of, draft_kind, megatron_llama3, without_additions
from ..models.drafts import check_single, settings_missing
from .model import Model, canonical_tensors, chunks_of

# Word of config.json -> the field of the draft's `TransformerConfig`, to which ModelOpt adds those of EAGLE.
_WORDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
}
# What engines compute, whatever a draft's config.json says.
_COMPUTED = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "rotary_percent": 1.0,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
}


@dataclass(frozen=True)
class MegatronDraft:
    """A draft on a rank of the last stage, in the model chunk that it is a child of."""

    child: str
    chunk: nn.Module

    @property
    def module(self) -> nn.Module:
        return self.chunk.get_submodule(self.child)

    @property
    def kind(self) -> Kind:
        """`ExportError` for a kind that is not exported."""
        return draft_kind(self.child, [name for name, _ in self.module.named_parameters()])

    def settings(self) -> dict:
        """What its `eagle_config` or its names say, in the words of config.json. `ExportError` for what engines do not compute."""
        if self.kind.counts:
            return self.kind.counts([name for name, _ in self.module.named_parameters()])
        if not hasattr(self.chunk, "eagle_config"):
            raise settings_missing(self.child)
        said, built = vars(self.chunk.eagle_config), vars(self.module.config)
        problems = [
            f"the draft has {name} = {said[name]!r}, and engines compute it with {means!r}"
            for name, means in _COMPUTED.items()
            if name in said and (said[name] or None) != (means or None)
        ]
        problems += [
            f"the draft was built with {name} = {built[name]!r}, and its eagle_config says {said.get(name)!r}"
            for name in _WORDS.values()
            if name in built and built[name] != said.get(name)
        ]
        report(problems)
        found = {word: said.get(field) for word, field in _WORDS.items()}
        found["eagle_aux_hidden_state_layer_ids"] = list(said.get("eagle_aux_hidden_state_layer_ids") or ())
        known, theirs = said.get("draft_vocab_size"), said.get("vocab_size")
        found["draft_vocab_size"] = None if known == theirs else known  # theirs may be padded
        factor = said.get("rope_scaling_factor")
        found["rope_scaling"] = megatron_llama3(factor) if said.get("rope_scaling") and factor else None
        return found

    def shards(self) -> Shards:
        """Canonical name -> this rank's shard of the draft; of one without an output layer, the base's."""
        kind = self.kind
        named = self.module.named_parameters() if kind.counts else canonical_tensors(self.module)
        found = {canonical_in(kind, name): tensor.detach() for name, tensor in named}
        if "output_layer.weight" not in found and not kind.counts:
            tied = self.chunk.share_embeddings_and_output_weights
            head = self.chunk.shared_embedding_or_output_weight() if tied else self.chunk.output_layer.weight
            found["output_layer.weight"] = head.detach()
        return Shards(found)


def heads_of(model: Model) -> Shards:
    """Canonical name -> this rank's shard of Medusa's heads that are written with their base; none but on the last stage."""
    found = draft_in(model)
    named = found.module.named_parameters() if found else ()
    return Shards({f"{found.child}.{name}": one.detach() for name, one in named if without_additions(name) is not None})


def draft_in(model: Model) -> MegatronDraft | None:
    """The draft of a model on this rank, None where there is none. `ExportError` for several."""
    found = [
        MegatronDraft(name, chunk) for chunk in chunks_of(model) for name, _ in chunk.named_children() if child_of(name)
    ]
    check_single([one.child for one in found])
    return found[0] if found else None
