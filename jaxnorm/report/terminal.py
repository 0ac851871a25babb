"""The table of a study, for the terminal."""

from rich import box
from rich.table import Table

from jaxnorm.lab.results import StudyResult
from jaxnorm.report.words import COLUMNS, NETWORKS, NORMALIZATIONS, cells


def build_tables(result: StudyResult) -> list[Table]:
    """Build a table for each network: accuracy, steps to 90 % of the best, highest stable rate.

    Args:
        result: the result of a finished study.

    Returns:
        Tables for `rich.console.Console.print`.

    Raises:
        Nothing of its own.

    Example:
        >>> from jaxnorm.lab.results import StudySummary
        >>> row = StudySummary("mlp", "batch", 0.3, accuracy_mean=0.976, accuracy_deviation=0.005)
        >>> result = StudyResult({}, {}, curves=(), summaries=(row,), recorded=(), seconds=0.0)
        >>> [(table.title, table.row_count) for table in build_tables(result)]
        [('Deep sigmoid MLP', 1)]
    """
    tables = []
    for network in dict.fromkeys(row.network for row in result.summaries):
        table = Table(
            title=NETWORKS.get(network, network),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("normalization", no_wrap=True)
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for row in result.summaries:
            if row.network == network:
                name = NORMALIZATIONS.get(row.normalization, row.normalization)
                table.add_row(name, *cells(row))
        tables.append(table)
    return tables
