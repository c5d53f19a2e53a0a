"""The site builds without a warning: no link, anchor, page or name of the API leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, READMES, ROOT, read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # It reports warnings as an error, by mkdocs.yml; what it says of its own future is none.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_each_page_is_in_it(site: Path) -> None:
    for page in (page for page in PAGES if page not in READMES):
        assert (site / Path(page).name).with_suffix(".html").is_file()


def test_the_api_shows_signatures_and_docstrings(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for name in ("wrapper", "load", "save", "plan_for", "unwrap"):
        assert f"{name}(" in text
    assert "Make model run within memory_limit" in text


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in site.glob("*.html")]
    sources = {
        found for page in pages for found in re.findall(r'(?:src|href)="(https?://[^"]+)"', page)
    }
    loaded = {link for link in sources if re.search(r"\.(js|css|woff2?|png|svg)(\?|$)", link)}
    assert pages and loaded == set()


@pytest.mark.parametrize("page", READMES)
def test_links_of_the_readme(page: str) -> None:
    """They are read where the files lie, not in the site."""
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", read(page)):
        assert (ROOT / target).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", read(target), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}
