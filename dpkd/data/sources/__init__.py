"""Finds the samples of a source of any kind."""

from dataclasses import replace

from dpkd.data.settings import FolderSource, ShardSource, TableSource
from dpkd.data.sources.archives import find_in_archives
from dpkd.data.sources.folders import find_in_folders
from dpkd.data.sources.records import SourceContents
from dpkd.data.sources.tables import find_in_table
from dpkd.launch.pool import Pool


def find(source: FolderSource | TableSource | ShardSource, *, pool: Pool) -> SourceContents:
    """All samples of a source, in a deterministic order; raises `UserError` for a source without samples.

    A sample whose name is not UTF-8 is bad: a reader of the shards could not decode the name.
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
            reason = "its name is not UTF-8: rename it, for example with `convmv -r -f latin1 -t utf8 --notest FOLDER`"
            bad.append((record.name, reason))
    # `\xe9` replaces a byte that is not UTF-8
    shown = [(item.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), why) for item, why in bad]
    return replace(contents, records=tuple(records), bad=tuple(shown))
