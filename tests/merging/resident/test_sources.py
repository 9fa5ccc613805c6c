"""Where sources live: the same bits everywhere, one copy for a node, and a choice by sizes alone."""

import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evomerge.merging.methods.drawn import Drawn, field_part
from evomerge.merging.methods.kernels import uniform_field
from evomerge.merging.resident.sources import Choice, OffDevice, choose, finite
from evomerge.merging.sources.weights import Weights


@pytest.mark.parametrize("start", [0, 70_000])
def test_a_field_that_is_made_again_has_the_bits_of_one_that_is_kept(start):
    kept, made = uniform_field(3, 1, "a", 100_000, "cpu"), Drawn(3, 1, "a")
    assert torch.equal(field_part(made, slice(start, 100_000), torch.device("cpu")), kept[start:])


def test_uniform_numbers_are_hashes_in_unsigned_arithmetic():
    from evomerge.merging.methods.drawn import key_of

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    key = key_of(3, 1, "a")
    low, high = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    for start in (0, 1 << 31, 3 << 32):
        expected = [
            (mix(mix((index & 0xFFFFFFFF) ^ low) + (index >> 32) * 0x9E3779B1 + high & 0xFFFFFFFF) >> 16) - 32768
            for index in range(start, start + 50)
        ]
        found = field_part(Drawn(3, 1, "a"), slice(start, start + 50), torch.device("cpu"))
        assert found.tolist() == expected


def test_auto_takes_the_fastest_way_that_fits():
    assert choose(60, 40, 20, device=200, host=500) == Choice("device", "kept")
    assert choose(60, 40, 20, device=100, host=500) == Choice("device", "made")
    assert choose(60, 40, 20, device=70, host=500) == Choice("host", "kept")
    assert choose(60, 40, 20, device=24, host=500) == Choice("host", "made")
    assert choose(60, 40, 20, device=24, host=50) == Choice("disk", "made")
    assert choose(60, 40, 20, device=None, host=200) == Choice("host", "kept")
    assert choose(60, 40, 20, device=None, host=200, workers=3) == Choice("host", "made")
    assert choose(60, 40, 20, device=None, host=70) == Choice("disk", "made")


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_one_value_that_is_not_finite_is_found_in_any_piece(bad, place):
    tensor = torch.ones(200_000, dtype=torch.bfloat16)
    assert bool(finite(tensor))
    tensor[place] = bad
    assert not bool(finite(tensor))


SIZE = 64 << 20


def pss() -> int:
    return 1024 * int(re.findall(r"^Pss: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[0])


def taken(folder: Path) -> int:
    """This process's share of the files that it has mapped from a folder, and all memory that lies in no file."""
    size = re.findall(r"^Pss_Anon: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    size += [
        share
        for mapping in mappings
        if f" {folder}/" in mapping
        for share in re.findall(r"^Pss: +(\d+)", mapping, re.MULTILINE)
    ]
    return 1024 * sum(map(int, size))


def _hold(folder: Path, leaves: bool, link: Connection) -> None:
    before = pss()
    tensor = OffDevice(Weights(folder), "a", torch.Size([SIZE // 2]), {}, leaves).on(torch.device("cpu"))
    assert bool(finite(tensor))
    link.send(before)
    while link.recv():
        link.send(pss())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_second_process_of_a_node_shares_the_sources(tmp_path):
    save_file({"a": torch.ones(SIZE // 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    spawn = multiprocessing.get_context("spawn")
    links, before, total = [], 0, []
    for _ in range(2):
        link, other = spawn.Pipe()
        process = spawn.Process(target=_hold, args=(tmp_path, False, other), daemon=True)
        process.start()
        links.append(link)
        before += link.recv()
        sizes = []
        for each in links:
            each.send(True)
            sizes.append(each.recv())
        total.append(sum(sizes) - before)
    for each in links:
        each.send(False)
    assert total[0] > 0.9 * SIZE
    assert total[1] - total[0] < 0.1 * SIZE
