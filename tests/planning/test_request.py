"""An option is one field: flag, keyword, fingerprint and manifest come from it by themselves."""

import inspect
from dataclasses import dataclass, fields, replace

import pytest

from megatron_export import export_hf_checkpoint, export_hf_checkpoint_async, plan_hf_tensors
from megatron_export.cli.config import ExportConfig
from megatron_export.cli.flags import Parser, add_options, config_of
from megatron_export.common.options import flag_of, option, options_of
from megatron_export.formats import Options
from megatron_export.planning.request import Request, requested

OPTIONS = options_of(Request)


@dataclass(frozen=True)
class Wider(Request):
    """A request with an option that somebody adds."""

    rounding: str = option("nearest", "how numbers are rounded", choices=("nearest", "up"))


def test_an_option_that_is_added_is_a_flag_and_in_the_fingerprint_and_in_the_manifest() -> None:
    assert flag_of(options_of(Wider)["rounding"]) == "--rounding"
    assert Wider().digested() == Request().digested() | {"rounding": "nearest"}
    assert Wider(rounding="up").said() == {"rounding": "up"}


def test_every_option_of_a_format_is_an_option_of_the_request_and_in_the_fingerprint() -> None:
    names = {field.name for field in fields(Options)}
    assert names <= set(OPTIONS)
    numbers = {"kv_scale", "kv_scale_at_least", "input_scale"}  # which decide bytes too
    assert Request().digested() == {name: OPTIONS[name].default for name in names | numbers}
    other = requested({"group_size": 64, "awq_clip": True})
    assert other.options == Options(group_size=64, awq_clip=True)
    assert other.said() == {"group_size": 64, "awq_clip": True}


def test_every_option_is_a_keyword_of_the_library_and_a_flag_of_the_command() -> None:
    keywords = inspect.signature(export_hf_checkpoint).parameters
    assert set(OPTIONS) <= set(keywords)
    assert all(name in export_hf_checkpoint.__doc__ for name in OPTIONS)
    parser = Parser()
    add_options(parser)
    config = config_of(parser, vars(parser.parse_args(["--dry-run", "--no-fsync", "--group-size", "64"])))
    assert config.request == replace(requested({"group_size": 64}), sync=False)
    assert set(OPTIONS) < set(options_of(ExportConfig))
    assert {action.dest for action in parser._actions} == {"help", *options_of(ExportConfig)}


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"formt": "fp8"}, "unexpected keyword 'formt'. Did you mean 'format'?"),
        ({"colour": 1}, "unexpected keyword 'colour'. Known: format, "),
        ({"resume": True}, "the keyword 'resume' has no effect here. Leave it out"),
    ],
)
def test_a_keyword_that_is_no_option_is_refused_with_what_was_meant(keywords: dict, said: str) -> None:
    with pytest.raises(TypeError) as refused:
        requested(keywords, without=("resume",))
    assert str(refused.value).startswith(said)


def test_functions_show_the_options_that_have_an_effect_there() -> None:
    waited = set(inspect.signature(export_hf_checkpoint).parameters)
    assert waited - set(inspect.signature(export_hf_checkpoint_async).parameters) >= {
        "resume",
        "target",
        "draft_format",
    }
    assert "overwrite" not in inspect.signature(plan_hf_tensors).parameters
