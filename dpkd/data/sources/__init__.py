"""Finding the samples of a source, whatever its kind."""

from dataclasses import replace

from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.sources.archives import find_in_archives
from dpkd.data.sources.folders import find_in_folders
from dpkd.data.sources.records import SourceContents
from dpkd.data.sources.tables import find_in_table
from dpkd.launch.pool import Pool


def find(source: FolderSource | TableSource | ShardSource, *, pool: Pool) -> SourceContents:
    """All samples of a source, in an order that is the same each time; raises `UserError` for a source without any.

    A sample with a name that is not UTF-8 is among the bad ones: what is packed must be read again.
    """
    match source:
        case FolderSource():
            contents = find_in_folders(source)
        case TableSource():
            contents = find_in_table(source)
        case ShardSource():
            contents = find_in_archives(source, pool=pool)
    records, bad = [], list(contents.bad)
    for record in contents.records:
        names = (record.name, record.class_name, record.split, record.group, *record.given)
        try:
            "".join(name for name in names if name is not None).encode()
            records.append(record)
        except UnicodeEncodeError:
            reason = "its name is not UTF-8: rename it, as by `convmv -r -f latin1 -t utf8 --notest FOLDER`"
            bad.append((record.name, reason))
    # with `\xe9` for each byte that is not UTF-8
    shown = [(item.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), why) for item, why in bad]
    return replace(contents, records=tuple(records), bad=tuple(shown))
