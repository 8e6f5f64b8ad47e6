"""The schema is the one list of figures: what shows or hands out figures names those of the schema, and all of them."""

from dataclasses import fields

import pytest

from bdcli.cli.output import SUMMARY
from bdcli.decode.result import DecodeResult
from bdcli.results.cells import CELL_FIELDS
from bdcli.results.figures import PERCENT, Figure, figures_of
from bdcli.results.metrics import Metrics
from bdcli.results.schema import Figures, Run
from bdcli.results.tables import COLUMNS, HEADINGS, PRIORITY


def names(kind):
    return {field.name for field in fields(kind)}


def test_every_heading_has_its_column_in_the_report():
    assert {name for name, figure in figures_of(Run).items() if figure.heading} == set(COLUMNS)
    assert len(set(HEADINGS)) == len(COLUMNS) and set(PRIORITY) <= set(COLUMNS)


def test_metrics_and_cells_are_columns_of_the_store():
    assert names(Metrics) <= set(Figures.model_fields)
    assert set(CELL_FIELDS) <= set(Run.model_fields) and len(set(CELL_FIELDS)) == len(CELL_FIELDS)


def test_the_summary_shows_figures_of_a_result():
    shown = dict.fromkeys([*names(DecodeResult), *Run.model_fields], "x")
    assert all(pattern.format_map(shown) for pattern in SUMMARY.values())


def test_every_figure_says_what_it_means():
    assert all(Figures.model_fields[name].description for name in Figures.model_fields)


@pytest.mark.parametrize(
    ("value", "cell", "sentence"), [(0.5, "50.0 %", "50.0%"), (None, "", "nothing drafted"), (0.0, "0.0 %", "0.0%")]
)
def test_a_figure_is_written_for_a_cell_and_for_a_sentence(value, cell, sentence):
    figure = Figure(PERCENT, missing="nothing drafted")
    assert (figure.cell(value), figure.sentence(value)) == (cell, sentence)
