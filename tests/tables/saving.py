"""Writes the tables as a checkpoint does."""

from pathlib import Path

from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import tables_in_pieces, write_in_pieces


def save_tables(tables: ShardedTables, folder: Path, rank: int) -> None:
    """This rank's file of a checkpoint."""
    write_in_pieces(folder / f"tables-{rank:05d}.safetensors", *tables_in_pieces(tables))
