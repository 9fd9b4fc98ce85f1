"""Reports out of records: the page of a run, model cards, tables and figures of the docs, the paper in miniature.

folder -> rows -> figures, speed, sections -> page (HTML), card (Markdown), pages, conversion, marks (Markdown and SVG)
"""

from kvfold.report.card import card
from kvfold.report.page import render, report
from kvfold.report.planes import first_planes
from kvfold.report.tables import summary

__all__ = [
    "card",
    "first_planes",
    "render",
    "report",
    "summary",
]
