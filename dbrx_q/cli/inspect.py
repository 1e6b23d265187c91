"""`dbrx-q inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import output

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q inspect dbrx-int4")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Tensors by kind: count, format, bits per weight, bytes."""
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.checkpoint.inventory import take_inventory

    folder = resolve_folder(path)
    with Checkpoint(folder) as checkpoint:
        inventory = take_inventory(checkpoint)
    if json:
        output.print_json(inventory.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "format", *(("tensors", "parameters", "bytes", "bits per weight")))
    for column in table.columns[2:]:
        column.justify = "right"
    for kind, row in inventory.kinds.items():
        table.add_row(kind, row.format, f"{row.count}", f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits_per_weight:.3f}")
    table.add_section()
    total = inventory.total
    table.add_row("total", "", f"{total.count}", f"{total.parameters:,}", f"{total.bytes:,}", f"{total.bits_per_weight:.3f}")
    Console(highlight=False).print(table)
