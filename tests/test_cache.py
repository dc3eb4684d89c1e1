"""The cache: computed once, the same numbers ever after, whole files or none."""

from pathlib import Path

import pytest
import torch

from motionlora.data.cache import cached, content_key, replacing
from motionlora.data.errors import StorageError


def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 8, generator=generator)
    return {"float": wide, "half": wide.to(torch.bfloat16), "turned": wide.T, "whole": torch.arange(4)}


def forbidden() -> dict[str, torch.Tensor]:
    raise AssertionError("computed although it was stored")


def test_second_time_reads_the_same_numbers_without_computing(tmp_path: Path) -> None:
    first = cached(tmp_path, "key", drawn)
    again = cached(tmp_path, "key", forbidden)
    assert first.keys() == again.keys() == drawn().keys()
    for name, tensor in drawn().items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(again[name], tensor)
        assert first[name].dtype == again[name].dtype == tensor.dtype
        assert first[name].stride() == again[name].stride()


@pytest.mark.parametrize("damage", [b"", b"not tensors", b"half", b"one bit"])
def test_damaged_file_is_removed_said_and_made_anew(tmp_path: Path, damage: bytes) -> None:
    cached(tmp_path, "key", drawn)
    path = tmp_path / "key.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])  # of the last number: everything else is as it was
    path.write_bytes({b"half": whole[: len(whole) // 2], b"one bit": flipped}.get(damage, damage))
    said: list[str] = []
    assert torch.equal(cached(tmp_path, "key", drawn, said.append)["float"], drawn()["float"])
    assert len(said) == 1
    assert str(path) in said[0]
    assert torch.equal(cached(tmp_path, "key", forbidden)["float"], drawn()["float"])


def test_nothing_is_stored_when_computing_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cached(tmp_path, "key", forbidden)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        cached(tmp_path / "file" / "below", "key", drawn)


def test_keys_differ_by_value_kind_order_and_cut() -> None:
    keys = [(1,), (1.0,), ("1",), (None,), ("None",), (True,), (1, 2), (2, 1), ("ab", "c"), ("a", "bc"), ("abc",), ()]
    assert len({content_key(*key) for key in keys}) == len(keys)
    assert content_key("a", 1, 0.1, None) == content_key("a", 1, 0.1, None)
    assert len(content_key("a")) == 64


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as draft:
        draft.write_text("old")
    with pytest.raises(TypeError), replacing(path) as draft:
        draft.write_bytes("half")  # pyright: ignore[reportArgumentType]
    assert path.read_text() == "old"
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]
