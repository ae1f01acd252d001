"""Finding the samples of a source, whatever its kind."""

from dataclasses import replace

from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.sources.archives import find_in_archives
from dpkd.data.sources.folders import find_in_folders
from dpkd.data.sources.records import Record, SourceContents, readable_name
from dpkd.data.sources.tables import find_in_table
from dpkd.launch.pool import Pool


def find(source: FolderSource | TableSource | ShardSource, *, pool: Pool) -> SourceContents:
    """All samples of a source, in an order that is the same each time; raises `UserError` where there are none.

    A sample with a name that is not UTF-8 is among the bad ones: what is packed must be read again.
    """
    match source:
        case FolderSource():
            contents = find_in_folders(source)
        case TableSource():
            contents = find_in_table(source)
        case ShardSource():
            contents = find_in_archives(source, pool=pool)
    bad = [record for record in contents.records if not _can_be_written(record)]
    if not bad and all(item.isprintable() for item, _ in contents.bad):
        return contents
    reason = "its name is not UTF-8: rename it, as by `convmv -r -f latin1 -t utf8 --notest FOLDER`"
    return replace(
        contents,
        records=tuple(record for record in contents.records if _can_be_written(record)),
        bad=(
            *((readable_name(item), words) for item, words in contents.bad),
            *((readable_name(record.name), reason) for record in bad),
        ),
    )


def _can_be_written(record: Record) -> bool:
    texts = (record.name, record.class_name, record.split, record.group, *(name for name, _ in record.experts))
    try:
        "".join(text for text in texts if text is not None).encode()
    except UnicodeEncodeError:
        return False
    return True
