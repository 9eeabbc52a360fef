"""The templates of this folder, filled in: HTML is escaped, Markdown is not, and a value that nobody gave is an error."""

import json
from statistics import median, median_high
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ... import __version__
from ...common.text import readable, some

_TEMPLATES = Environment(
    loader=PackageLoader(__package__),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
# Filters are named as Python's functions are; `number` takes a format specification: x | number(".2f").
_TEMPLATES.filters |= {"number": format, "json": json.dumps, "median": median, "median_high": median_high}
_TEMPLATES.filters |= {"readable": readable, "some": some}


def rendered(template: str, **values: Any) -> str:
    """`templates/<template>` with these values. `jinja2.UndefinedError` where it asks for another."""
    return _TEMPLATES.get_template(template).render(values, version=__version__)
