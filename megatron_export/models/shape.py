"""The sizes of a model that names, layouts and shapes depend on."""

from dataclasses import dataclass

from .layer_kinds import Kind, Layers


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of linear attention (a gated delta net): heads of keys and of values, how wide each is, what a convolution sees."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        return self.value_heads * self.value_width

    @property
    def per_key(self) -> int:
        """Heads of values that share a head of keys."""
        return self.value_heads // self.key_heads


@dataclass(frozen=True)
class Mamba:
    """Sizes of Mamba mixers: heads, how wide each is, groups that share a state of so many numbers, what a convolution sees."""

    heads: int
    width: int
    groups: int
    state: int
    kernel: int

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def states(self) -> int:
        return self.groups * self.state

    @property
    def segments(self) -> tuple[int, ...]:
        """Rows of the projection in: z, x, B, C and dt."""
        return (self.inner, *self.convolved, self.heads)

    @property
    def convolved(self) -> tuple[int, ...]:
        """Those that are convolved: x, B and C."""
        return (self.inner, self.states, self.states)


@dataclass(frozen=True)
class ModelShape:
    """Unsharded sizes, the vocabulary unpadded; sizes of experts or latent attention are 0 in a model without.

    `kinds` say what each layer is made of; `delta` and `mamba` are there where a layer is of that kind. Layers that predict one
    more token, `mtp` of them, follow the `layers` of the decoder, in HF's numbers too. `output_gate`: every query has a gate;
    `ungated`: MLPs and experts have none. `latent` is what experts read and write, if that is not `hidden`. Of a draft, `vocab` is
    its own, `base_vocab` that of its base, and `read` the number of the base's hidden states that it reads. Of
    Medusa's heads, `layers` counts the heads, and `blocks` those of each; of a model that they are written with, `medusa` counts
    them. `indexed` are the layers with an indexer, which chooses what attention sees.
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
    kinds: Layers = ()
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
    delta: DeltaNet | None = None
    mamba: Mamba | None = None
    output_gate: bool = False
    ungated: bool = False
    latent: int = 0
    medusa: int = 0

    @property
    def every(self) -> range:
        """All layers, those that predict one more token too."""
        return range(self.layers + self.mtp)

    @property
    def predicting(self) -> range:
        """The layers that predict one more token."""
        return range(self.layers, self.layers + self.mtp)

    def having(self, *kinds: Kind) -> tuple[int, ...]:
        """The layers that are of one of these kinds."""
        return tuple(layer for layer, its in enumerate(self.kinds) if any(kind in kinds for kind in its))
