"""What users read of an exception that is none of ours, or a mistake of ours."""

import pytest
import torch

from megatron_export.common.errors import ExportError, message_of
from megatron_export.common.piece import Axis
from megatron_export.export import transport
from megatron_export.planning.tensor_spec import Output


def raised(kind: type[Exception], words: str) -> Exception:
    with pytest.raises(kind) as caught:
        raise kind(words)
    return caught.value


def test_an_error_for_users_is_its_own_message() -> None:
    assert message_of(raised(ExportError, "Give another folder")) == "Give another folder"


def test_any_other_exception_says_its_type_and_where_it_came_from() -> None:
    for kind in (MemoryError, AssertionError):
        said = message_of(raised(kind, "broken"))
        assert said.startswith(f"{kind.__name__}: broken (test_errors.py, line ")


def test_an_assertion_of_the_package_is_a_sentence_about_the_tensor() -> None:
    planned = Output("model.norm.weight", "F8_E4M3", (4,), (Axis.OUT,))
    with pytest.raises(AssertionError) as caught:
        transport._packed([planned], [torch.ones(4, dtype=torch.bfloat16)])
    said = message_of(caught.value)
    assert said.startswith(
        "model.norm.weight is torch.bfloat16 (4,), and was planned as torch.float8_e4m3fn (4,) (transport.py, line "
    )
    assert said.endswith(". This is a mistake of megatron_export, and not of your model: please report it")
