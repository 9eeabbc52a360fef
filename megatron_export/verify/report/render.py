"""The templates of this folder, filled in. What a value says is text and nothing else, in HTML and in Markdown; a value that nobody
gave is an error.
"""

import json
from pathlib import Path
from statistics import median, median_high
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from ...common.text import clean, readable, some


def _in_markdown(value: object) -> object:
    """A text in one line that starts no tag, link or code; `| safe` is for what is Markdown."""
    if type(value) is not str:
        return value
    return " ".join(value.split("\n")).replace("`", "'").replace("<", "&lt;").replace("](", "]\\(")


_COMMON: dict[str, Any] = {"loader": PackageLoader(__package__), "undefined": StrictUndefined}
_COMMON |= {"trim_blocks": True, "keep_trailing_newline": True}
_TEMPLATES = {".html": Environment(**_COMMON, autoescape=True), ".md": Environment(**_COMMON, finalize=_in_markdown)}
for _one in _TEMPLATES.values():
    # Filters are named as Python's functions are; `number` takes a format specification: x | number(".2f").
    _one.filters |= {"number": format, "json": json.dumps, "median": median, "median_high": median_high}
    _one.filters |= {"readable": readable, "some": some}


def rendered(template: str, **values: Any) -> str:
    """`templates/<template>` with these values. `jinja2.UndefinedError` where it asks for another."""
    return clean(_TEMPLATES[Path(template).suffix].get_template(template).render(values, version=__version__))
