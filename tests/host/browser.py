"""The machine's Chromium or Chrome."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)
