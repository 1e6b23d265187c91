"""`dbrx-q inspect`."""

from __future__ import annotations

from . import options, terminal
from .help import example

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q inspect dbrx-int4")


def command(
    path: options.Checkpoint,
    json: options.Json = False,
) -> None:
    """List the tensors by kind: count, format, bits per weight and bytes; downloads no weights."""
    from dbrx_q.checkpoint.inventory import take_inventory
    from dbrx_q.sources.open_weights import open_headers

    with open_headers(path) as weights:
        inventory = take_inventory(weights)
    if json:
        terminal.print_json(inventory.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "format", "tensors", "parameters", "bytes", "bits per weight")
    for column in table.columns[2:]:
        column.justify = "right"
    names = [name for row in inventory.kinds.values() for name in row.format.split()]
    table.columns[1].min_width = max(map(len, names), default=0)  # a narrow terminal wraps the header of another column, and cuts no name
    for kind, row in inventory.kinds.items():
        table.add_row(kind, row.format, f"{row.count}", f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits_per_weight:.3f}")
    table.add_section()
    total = inventory.total
    table.add_row("total", "", f"{total.count}", f"{total.parameters:,}", f"{total.bytes:,}", f"{total.bits_per_weight:.3f}")
    Console(highlight=False, markup=False).print(table)
