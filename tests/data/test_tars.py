import io
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.data.tars import Member, TarWriter, list_members

LONG = "folder/" * 20 + "ünïcode-näme.jpg"
CONTENT = {"a.jpg": b"x" * 700, "a.json": b"{}", LONG: b"y" * 512, "b.jpg": b""}


def written(content: dict[str, bytes]) -> tuple[bytes, list[Member]]:
    buffer = io.BytesIO()
    writer = TarWriter(buffer)
    members = [writer.add(name, data) for name, data in content.items()]
    writer.finish()
    assert writer.size_bytes == len(buffer.getvalue())
    return buffer.getvalue(), members


def test_the_standard_library_reads_what_was_written_and_nothing_of_the_writer_is_in_it():
    data, members = written(CONTENT)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        infos = archive.getmembers()
        assert {info.name: data[info.offset_data : info.offset_data + info.size] for info in infos} == CONTENT
    assert [info.offset_data for info in infos] == [member.offset for member in members]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in infos} == {(0, 0, 0, "", "")}
    assert data == written(CONTENT)[0]


def test_listing_finds_what_was_written():
    data, members = written(CONTENT)
    listing = list_members(io.BytesIO(data), size_bytes=len(data))
    assert listing.fault is None
    assert list(listing.members) == members


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=0, max_value=10_000))
def test_a_tar_cut_anywhere_gives_whole_members_and_says_that_it_was_cut(position):
    data, members = written(CONTENT)
    cut = data[: position % (len(data) - 1023)]
    listing = list_members(io.BytesIO(cut), size_bytes=len(cut))
    assert listing.fault is not None
    assert "cut" in listing.fault
    assert list(listing.members) == members[: len(listing.members)]
    assert all(member.offset + member.size <= len(cut) for member in listing.members)


def test_a_damaged_header_in_the_middle_is_a_fault():
    data, members = written(CONTENT)
    damaged = bytearray(data)
    damaged[members[0].offset + 1024 : members[0].offset + 1100] = b"\xff" * 76
    listing = list_members(io.BytesIO(bytes(damaged)), size_bytes=len(damaged))
    assert listing.fault is not None
    assert list(listing.members) == members[:1]
