"""Finding the samples of a source, whatever its kind."""

from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.sources.archives import find_in_archives
from dpkd.data.sources.folders import find_in_folders
from dpkd.data.sources.records import Found
from dpkd.data.sources.tables import find_in_table
from dpkd.launch.pool import Pool


def find(source: FolderSource | TableSource | ShardSource, *, pool: Pool) -> Found:
    """All samples of a source, in an order that is the same each time; raises `UserError` where there are none."""
    match source:
        case FolderSource():
            return find_in_folders(source)
        case TableSource():
            return find_in_table(source)
        case ShardSource():
            return find_in_archives(source, pool=pool)
