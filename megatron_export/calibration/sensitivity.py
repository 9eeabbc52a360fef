"""The look back: what each format costs in each linear, in nats per token, from one pass of data with gradients.

Let g be the gradient of the text's loss by a linear's outputs for one token, and d what changes in these outputs if the linear is
quantized, its inputs too. Then (g . d)^2 / 2, summed over tokens and divided by all tokens of the data, is the rise of the loss to
second order, with the empirical Fisher matrix of the outputs. An output error alone does not know where in the network it is
made; this does. The costs of linears add up. On the example model it is 1.1 to 1.5 times the KL that is measured with one linear in
nvfp4, and in the same order. The diagonal of the matrix alone, (g^2 . d^2), takes the errors of outputs for independent, which
those that come of rounded inputs are not.

A weight is quantized whole, as an export does it: tensor-parallel ranks gather it, and each takes its rows or columns of the
result. Its amax is that of the linear in Megatron; what engines fuse beyond that is measured linear by linear, each with its own.
Sums of micro-batches are rounded to float32 and added in float64, which rounds nothing: it does not matter which replica had which.
Source: second-order losses as in Optimal Brain Damage (LeCun 1989), with the empirical Fisher matrix in place of the Hessian.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from .. import formats
from ..common.errors import ExportError
from ..common.piece import Amax, Axis
from ..distributed.collectives import spread, total, whole
from ..distributed.topology import Cut, Topology
from ..formats import Form
from ..models import cut_of, is_expert
from ..models.layouts import Layout, even_cut
from ..models.statistic_names import input_key, sensitivity_key
from .observer import Observer


class Sensitivities(Observer):
    """Observes the gradients of linears. Collective.

    forms       the formats that are tried
    statistics  with the amax of every input
    layouts     canonical module -> how its rows are laid out
    held_whole  the linears that every rank holds whole
    tokens      how many this rank's micro-batches have
    repeats     how many ranks of the stage are shown the same token of an expert
    """

    whole_sequences = True

    def __init__(
        self,
        here: Topology,
        forms: list[Form],
        statistics: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        held_whole: AbstractSet[str],
        tokens: int,
        repeats: int,
    ) -> None:
        self.here, self.forms, self.statistics = here, forms, statistics
        self.layouts, self.held_whole = layouts, held_whole
        self.tokens, self.repeats = tokens, repeats
        keys = {sensitivity_key(name, form.measured_as) for name in layouts for form in forms}
        self.sums = dict.fromkeys(keys, torch.zeros((), dtype=torch.float64, device=here.device))

    def gradient(self, name: str, weight: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        """Try all formats on one micro-batch, or on what an expert was given of it."""
        if not inputs.numel():
            return
        cut, axis = self.here.cut(is_expert(name)), cut_of(f"{name}.weight")
        axis = None if cut.size == 1 or name in self.held_whole else axis
        weight, inputs = weight.detach().to(torch.bfloat16), inputs.flatten(0, -2)
        gradient = gradient.flatten(0, -2).float()
        expected = torch.nn.functional.linear(inputs.float(), weight.float())
        parts = whole_parts(self.layouts[name], cut, axis, weight)
        entire = whole(cut, inputs, 1) if axis is Axis.IN else inputs
        for form in self.forms:
            if not cuts(form, parts):
                continue
            rounded, scale = self._rounded(form, parts, self.statistics[input_key(name)].to(weight.device))
            mine = own_part(self.layouts[name], cut, axis, rounded, weight.shape)
            given = form.arithmetic.inputs(entire, scale)
            given = given[:, even_cut(given.shape[1], cut.rank, cut.size)] if axis is Axis.IN else given
            change = torch.nn.functional.linear(given, mine) - expected
            slopes = (gradient * change).sum(dim=1)  # [tokens], of this rank's outputs or inputs
            slopes = total(slopes, cut.group) if axis else slopes
            square = slopes.square().sum(dtype=torch.float64)
            key = sensitivity_key(name, form.measured_as)
            self.sums[key] = self.sums[key] + (square if is_expert(name) else square.float().double())

    def _rounded(
        self, form: Form, parts: dict[str, Tensor], input_amax: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What an engine multiplies with in place of a weight's parts, float32; and the scale of its inputs, if there is one."""
        amax = Amax(torch.stack([part.abs().amax() for part in parts.values()]).amax().float(), input_amax)
        made = {part: formats.encode(form, tensor.contiguous(), amax) for part, tensor in parts.items()}
        scale = next(iter(made.values())).get("input_scale")
        decoded = {part: form.decode(pieces).to(form.arithmetic.torch_dtype).float() for part, pieces in made.items()}
        return decoded, scale.data if scale else None

    def agreed(self) -> dict[str, Tensor]:
        """Nats per token by linear and format, the same on every rank. Collective. `ExportError` for NaN and Inf."""
        count = total(torch.tensor(self.tokens, device=self.here.device), self.here.dp_group).item()
        mine = {}
        for key, sums in sorted(self.sums.items()):
            expert = is_expert(key)
            summed = total(sums.clone(), self.here.stage_group if expert else self.here.dp_group).cpu()
            mine[key] = summed / (2 * count * (self.repeats if expert else 1))
        found = spread(self.here, mine)
        if bad := [key for key, value in found.items() if not value.isfinite()]:
            raise ExportError(
                f"NaN or Inf in the gradients: {bad[0]}, of {len(bad)} in all. Check the weights, and that the model runs on this "
                "data in bfloat16"
            )
        return found


def cuts(form: Form, parts: Mapping[str, Tensor]) -> bool:
    """Whether a format can cut all parts into its tiles."""
    sizes = [pair for part in parts.values() for pair in zip(part.shape, form.tile, strict=True)]
    return form.ragged or all(size % tile == 0 for size, tile in sizes)


def whole_parts(layout: Layout, cut: Cut, axis: Axis | None, shard: Tensor) -> dict[str, Tensor]:
    """The HF parts of the whole weight, from the shards of all ranks of a cut along `axis`. Collective."""
    if axis is Axis.OUT and layout.splits(shard.shape[0]):
        return {part: whole(cut, rows, 0) for part, rows in layout.split(shard, cut.rank, cut.size).items()}
    dim = {Axis.OUT: 0, Axis.IN: 1}
    return layout.split(whole(cut, shard, dim[axis]) if axis else shard, 0, 1)


def own_part(layout: Layout, cut: Cut, axis: Axis | None, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """This rank's shard, of this shape, of the weight that has these whole parts."""
    if axis is Axis.OUT and layout.splits(shape[0]):
        mine = {part: rows[even_cut(rows.shape[0], cut.rank, cut.size)] for part, rows in parts.items()}
        return layout.join(mine, shape[0])
    joined = layout.join(parts, sum(part.shape[0] for part in parts.values()))
    if axis is None:
        return joined
    return (
        joined[even_cut(joined.shape[0], cut.rank, cut.size)]
        if axis is Axis.OUT
        else joined[:, even_cut(joined.shape[1], cut.rank, cut.size)]
    )
