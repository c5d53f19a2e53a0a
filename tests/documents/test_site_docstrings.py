"""tools/site_docstrings.py."""

from __future__ import annotations

from tools.site_docstrings import as_markdown


def test_parameters_become_a_list() -> None:
    docstring = """What it does: this.

model: the module,
    of any class.
limit: bytes.   device: where.
Raises ValueError, as it is.
"""
    assert (
        as_markdown(docstring)
        == """What it does: this.


- **model**: the module,
    of any class.
- **limit**: bytes.
- **device**: where.

Raises ValueError, as it is.
"""
    )


def test_a_list_behind_prose_is_one() -> None:
    assert as_markdown("One line.\nn, m: numbers.") == "One line.\n\n- **n, m**: numbers."


def test_prose_stays() -> None:
    prose = "The first line.\n\nAll else: it is no parameter.\nRaised by nobody."
    assert as_markdown(prose) == prose
