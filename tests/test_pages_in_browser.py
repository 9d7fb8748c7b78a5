"""The HTML pages in a real browser: what a reader sees on a phone in light mode and on a desktop in dark mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import OpenedPage, chromium
from support.html_pages import NAMES, PAGES

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WINDOWS = {"phone": (400, "light"), "desktop": (1280, "dark")}
MINIMUM_TEXT_PX, MINIMUM_PLOT_TEXT_PX, MINIMUM_CELL_PX = 11, 10, 60
# Of WCAG 2.2, level AA: 1.4.3 for text, 1.4.11 for graphics.
MINIMUM_TEXT_CONTRAST, MINIMUM_CURVE_CONTRAST = 4.5, 3.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def files(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp("pages")) for kind, make in PAGES.items()}


@pytest.fixture(scope="module", params=[(kind, window) for kind in PAGES for window in WINDOWS], ids=" on a ".join)
def view(request: pytest.FixtureRequest, browser: Any, files: dict[str, Path]) -> Iterator[OpenedPage]:
    kind, window = request.param
    width, scheme = WINDOWS[window]
    with OpenedPage(browser, files[kind], width=width, scheme=scheme) as opened:
        yield opened


def test_nothing_is_loaded_and_nothing_is_reported(view: OpenedPage) -> None:
    assert view.requests == [view.page.url]
    assert view.events == []


def test_names_of_the_user_are_text(view: OpenedPage) -> None:
    forbidden = "script, img:not([src^='data:image/png;base64,']), iframe, link, [onerror], [onload], [onclick]"
    assert view.page.locator(forbidden).count() == 0
    text = view.page.inner_text("body")
    assert all(name in text for name in NAMES.languages)


def test_text_is_readable_and_only_tables_and_plots_scroll(view: OpenedPage) -> None:
    assert view.audit("pageOverflow") == []
    assert view.audit("clippedText") == []
    assert view.audit("smallText", MINIMUM_TEXT_PX, MINIMUM_PLOT_TEXT_PX) == []
    assert view.audit("narrowCells", MINIMUM_CELL_PX) == []


def test_plots_are_drawn_within_their_frames(view: OpenedPage) -> None:
    assert view.audit("undrawnPlots") == []
    assert view.audit("overlappingLabels") == []


def test_text_and_curves_contrast_with_their_background(view: OpenedPage) -> None:
    assert view.audit("faintText", MINIMUM_TEXT_CONTRAST) == []
    assert view.audit("faintCurves", MINIMUM_CURVE_CONTRAST) == []


def test_headings_plots_and_tables_have_names_and_containers(view: OpenedPage) -> None:
    assert view.audit("headingsAndNames") == []
