"""Reports out of records: the page of a run, model cards, the README's table and figure, the paper in miniature.

folder -> rows -> figures, speed, sections -> page (HTML), card (Markdown), pages, conversion (Markdown and SVG)
"""

from kvfold.report.card import card
from kvfold.report.conversion import conversion_pages
from kvfold.report.page import render, report
from kvfold.report.pages import miniature_page, readme_figure, readme_table, readme_with_table, refresh
from kvfold.report.rows import summary

__all__ = [
    "card",
    "conversion_pages",
    "miniature_page",
    "readme_figure",
    "readme_table",
    "readme_with_table",
    "refresh",
    "render",
    "report",
    "summary",
]
