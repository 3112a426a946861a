"""The documentation names files, headings and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MATRICES = ["variants.md", "quantized.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def names_of_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_file_that_a_page_names_exists(page):
    for file in re.findall(r"`(tests/[\w/]+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", MATRICES)
def test_the_matrixs_codes_are_those_of_its_list_of_tests(page):
    """A cell has codes such as T1; below the matrix, a row for each file of tests says which test a code is."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    matrix, listed = re.split(r"\| file \| tests \|", text[text.index(" x operation\n") :])
    codes: set[str] = set()
    for file, entries in re.findall(r"^\| `(tests/[\w/]+\.py)` \| (.*) \|$", listed, re.MULTILINE):
        for code, test in re.findall(r"(\w+) `(\w+)`", entries):
            assert test in names_of_tests(file), f"{file}::{test}"
            assert code not in codes, code
            codes.add(code)
    assert set(re.findall(r"\bT\d+\b", matrix)) == codes
