"""The sizes of a model that names, layouts and shapes depend on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Unsharded sizes, the vocabulary unpadded; sizes of experts or latent attention are 0 in a model without.

    `sparse` are the layers with experts, `indexed` those with an indexer, which chooses what attention sees. `mtp` layers
    that predict one more token follow the `layers` of the decoder, in HF's numbers too; they are like its last. Of a draft, `vocab`
    is its own, `base_vocab` that of its base, and `read` the number of the base's hidden states that it reads. Of
    Medusa's heads, `layers` counts the heads, and `blocks` those of each.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    sparse: tuple[int, ...] = ()
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    mtp: int = 0
    index_heads: int = 0
    index_dim: int = 0
    indexed: tuple[int, ...] = ()
    base_vocab: int = 0
    read: int = 0
    blocks: int = 0

    @property
    def every(self) -> range:
        """All layers, those that predict one more token too."""
        return range(self.layers + self.mtp)

    @property
    def predicting(self) -> range:
        """The layers that predict one more token."""
        return range(self.layers, self.layers + self.mtp)

    @property
    def dense(self) -> tuple[int, ...]:
        """The layers without experts."""
        return tuple(layer for layer in self.every if layer not in self.sparse)
