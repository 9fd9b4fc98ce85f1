"""Reports: the page of a run and its model cards, from records, lineages and training logs.

folder -> studies (rows, benches) -> tables, figures, outcome -> speed, planes, sections -> page (HTML), card (Markdown)
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
