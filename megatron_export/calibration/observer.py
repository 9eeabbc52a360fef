"""What looks at a running model: whatever the model, and whoever runs it, it is shown the same calls under the same names."""

from typing import Protocol

from torch import Tensor


class Observer(Protocol):
    """What is shown the calls of a model's modules, by canonical name, one micro-batch after the other.

    Under sequence parallelism a column-parallel linear is called with its rank's part of the sequence; an observer that wants
    `whole_sequences` is shown them put together.
    """

    whole_sequences: bool

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """A linear is called with inputs [..., in]; an expert's with the tokens that it was given, perhaps none."""

    def gradient(self, name: str, weight: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        """A linear was called with inputs [sequence..., in], of whole sequences, and its outputs [sequence..., out] have this
        gradient; those of a row-parallel linear are whole.
        """

    def attention(self, name: str, key: Tensor, value: Tensor) -> None:
        """An attention is called with keys and values [sequence, batch, groups, head_dim]."""

    def experts(self, name: str, tokens: Tensor) -> None:
        """The experts of a layer are given so many tokens each: integers [this rank's experts]."""
