"""Finding the samples of a source, whatever its kind."""

from dpkd.data.archives import find_in_archives
from dpkd.data.folders import find_in_folders
from dpkd.data.records import Found
from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.tables import find_in_table
from dpkd.pool import Pool


def find(source: FolderSource | TableSource | ShardSource, *, pool: Pool) -> Found:
    """All samples of a source, in an order that is the same each time; raises `UserError` where there are none."""
    match source:
        case FolderSource():
            return find_in_folders(source)
        case TableSource():
            return find_in_table(source)
        case ShardSource():
            return find_in_archives(source, pool=pool)
