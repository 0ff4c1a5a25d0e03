"""The report of a verification as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import itertools
from pathlib import Path

import flatwater
from flatwater.errors import BackendError
from flatwater.verify.report import VerifyReport, number, share

__all__ = ["verify_page"]


def verify_page(report: VerifyReport, title: str) -> str:
    """The page.

    Args:
        report: what was compared.
        title: what the model is called.

    Raises:
        BackendError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise BackendError("jinja2 is not installed; pip install 'flatwater[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": share, "capitalise": lambda words: words[0].upper() + words[1:]}
    groups = [list(group) for _, group in itertools.groupby(report.rows, key=lambda row: row.form)]
    return environment.get_template("verify.html.j2").render(
        report=report,
        title=title,
        version=flatwater.__version__,
        groups=groups,
        tolerances=[f"{one:g}" for one in sorted({row.tolerance for row in report.rows})],
        worst=max((row.max_rel for row in report.rows if row.max_rel is not None), default=None),
        argmax=any(row.argmax is not None for row in report.rows),
        decoded=any(row.decoded is not None for row in report.rows),
    )
