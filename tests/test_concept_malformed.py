"""Malformed concept files: a hand-made corpus and a mutator that repairs the checksum, so that deeper code is reached.

Only InfusionError, quickly, and nothing allocated from a header's numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from infusion.concept import MAX_FILE, Concept
from infusion.errors import InfusionError
from tests.test_concept import resealed, small_file

GOOD = small_file()
LENGTH = int.from_bytes(GOOD[:8], "little")
HEADER, PAYLOAD = GOOD[8 : 8 + LENGTH], GOOD[8 + LENGTH :]


def with_header(header: bytes, payload: bytes = PAYLOAD, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + payload


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("data.pkl"))
    return buffer.getvalue()


def torch_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def meta(**changes: str) -> bytes:
    return resealed(GOOD, **changes)


def entry(**changes: object) -> bytes:
    return resealed(
        GOOD, residuals={"dtype": "U8", "shape": [len(PAYLOAD)], "data_offsets": [0, len(PAYLOAD)], **changes}
    )


CORPUS: dict[str, bytes] = {
    # what is no safetensors file at all
    "empty": b"",
    "one byte": b"\0",
    "zeros": b"\0" * 64,
    "ones": b"\xff" * 64,
    "text": b"milo is a dog, and this is a text file about him",
    "html": b"<!doctype html><html><body>404</body></html>" * 3,
    "json": json.dumps({"__metadata__": {"infusion.format": "1"}}).encode() * 3,
    "png": picture("PNG"),
    "jpeg": picture("JPEG"),
    "tar with a pickle": archive(),
    "torch zip": torch_file(False),
    "torch legacy": torch_file(True),
    "pickle protocol 0": b"cos\nsystem\n(S'true'\ntR." * 4,
    "pickle protocol 2": b"\x80\x02}q\x00." * 9,
    "pickle protocol 4": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00." * 4,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 40,
    "npy": b"\x93NUMPY\x01\0" + b"\0" * 60,
    "elf": b"\x7fELF" + b"\0" * 60,
    "too large": b"\0" * (MAX_FILE + 1),
    # header lengths
    "header of 0 bytes": with_header(b"", length=0),
    "header of 1 byte": with_header(HEADER, length=1),
    "header longer than the file": with_header(HEADER, length=len(GOOD)),
    "header of 2^63": with_header(HEADER, length=2**63),
    "header of 2^64 - 1": with_header(HEADER, length=2**64 - 1),
    "header of 100 MB": with_header(HEADER, length=100_000_000),
    "header cut by one": with_header(HEADER, length=LENGTH - 1),
    "header too long by one": with_header(HEADER, length=LENGTH + 1),
    "header above the limit": with_header(HEADER.rstrip() + b" " * 40_000),
    # JSON
    "no JSON": with_header(b"{" * 64),
    "an array": with_header(b"[1, 2, 3]"),
    "a number": with_header(b"17"),
    "null": with_header(b"null"),
    "deep arrays": with_header(b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "deep objects": with_header(b'{"a":' * 4000 + b"1" + b"}" * 4000),
    "a key twice": with_header(HEADER.rstrip()[:-1] + b',"residuals":{}}'),
    "a byte order mark": with_header(b"\xef\xbb\xbf" + HEADER),
    "UTF-16": with_header(HEADER.decode().encode("utf-16")),
    "not UTF-8": with_header(HEADER.replace(b"milo", b"mi\xff\xfe")),
    "a trailing comma": with_header(HEADER.rstrip()[:-1] + b",}"),
    "NaN as a number": with_header(HEADER.replace(b'"shape":[', b'"shape":[NaN,')),
    "a huge integer": with_header(HEADER.replace(b'"shape":[', b'"shape":[' + b"9" * 5000 + b",")),
    "leading spaces": with_header(b"  " + HEADER),
    "metadata is a list": with_header(b'{"__metadata__":["infusion.format"],"residuals":{}}'),
    "metadata with numbers": with_header(b'{"__metadata__":{"infusion.format":1},"residuals":{}}'),
    "no metadata": with_header(b'{"residuals":{"data_offsets":[0,8],"dtype":"U8","shape":[8]}}'),
    "metadata of a LoRA": with_header(
        b'{"__metadata__":{"ss_network_module":"networks.lora"},"lora_unet_x.lora_up.weight":{}}'
    ),
    "thousands of entries": with_header(json.dumps({f"t{i}": {} for i in range(2000)}).encode()[:32_000]),
    # right checksum, wrong content
    "format 2": meta(infusion__format="2"),
    "format empty": meta(infusion__format=""),
    "unknown scheme": meta(infusion__scheme="int8"),
    "scheme of other size": meta(infusion__scheme="fp16"),
    "more values than bytes": meta(infusion__layers="m0.0:80"),
    "a billion values": meta(infusion__layers="m0.0:999999 d0.0.0:999999"),
    "a negative length": meta(infusion__layers="m0.0:-8"),
    "a length in words": meta(infusion__layers="m0.0:eight"),
    "a length in other digits": meta(infusion__layers="m0.0:٨"),
    "no layers": meta(infusion__layers=""),
    "a layer twice": meta(infusion__layers="m0.0:4 m0.0:4"),
    "a layer without name": meta(infusion__layers=":8"),
    "layers with two spaces": meta(infusion__layers="m0.0:8 "),
    "name with a path": meta(infusion__name="../milo"),
    "name with a tag": meta(infusion__name="<milo>"),
    "name empty": meta(infusion__name=""),
    "name too long": meta(infusion__name="m" * 65),
    "name in other letters": meta(infusion__name="mіlo"),  # noqa: RUF001 - a Cyrillic letter, on purpose
    "word empty": meta(infusion__word="  "),
    "word too long": meta(infusion__word="d" * 65),
    "settings no JSON": meta(infusion__settings="{steps}"),
    "settings a list": meta(infusion__settings="[]"),
    "settings nested": meta(infusion__settings='{"a":{"b":1}}'),
    "settings null": meta(infusion__settings='{"a":null}'),
    "settings with NaN": meta(infusion__settings='{"a":NaN}'),
    "settings with infinity": meta(infusion__settings='{"a":-Infinity}'),
    "settings with an escape": meta(infusion__settings='{"a":"\\u001b[2J"}'),
    "settings with half a letter": meta(infusion__settings='{"a":"\\ud83d"}'),
    "a layer with a number that is none": meta(infusion__layers="\u00b2:8"),
    "a layer with a number of 5000 digits": meta(infusion__layers="d" + "9" * 5000 + ".0.0:8"),
    "a layer with an escape": meta(infusion__layers="\x1b[2J:8"),
    "family with an escape": meta(modelspec__architecture="\x1b[2J/infusion"),
    "weights that are no hash": meta(infusion__base="a b"),
    "an extra key": meta(infusion__note="hello"),
    "an extra tensor": resealed(GOOD, payload=PAYLOAD + b"\0"),
    "tensor as F32": entry(dtype="F32"),
    "tensor of huge shape": entry(shape=[2**62]),
    "tensor of two axes": entry(shape=[2, len(PAYLOAD) // 2]),
    "tensor offsets apart": entry(data_offsets=[1, len(PAYLOAD)]),
    "tensor offsets reversed": entry(data_offsets=[len(PAYLOAD), 0]),
    "largest value infinite": resealed(GOOD, payload=b"\x80\x7f" + PAYLOAD[2:]),
    "largest value NaN": resealed(GOOD, payload=b"\xc0\x7f" + PAYLOAD[2:]),
    "largest value negative": resealed(GOOD, payload=bytes([PAYLOAD[0], PAYLOAD[1] | 0x80]) + PAYLOAD[2:]),
    "largest value denormal": resealed(GOOD, payload=b"\x01\x00" + PAYLOAD[2:]),
    "largest value 1e38": resealed(GOOD, payload=b"\x7f\x7e" + PAYLOAD[2:]),
    "no value as large as the largest": resealed(GOOD, payload=PAYLOAD[:2] + bytes([0x20, 0x08, 0x82]) * 2),
    "code zero": resealed(GOOD, payload=PAYLOAD[:2] + b"\0" * 6),
}


REMEDIES = r"get a fresh copy|upgrade infusion|diffusers loads|are \.safetensors files|given with --base|holds what no concept may"


@pytest.mark.parametrize("content", CORPUS.values(), ids=CORPUS.keys())
def test_corpus(content, tmp_path):
    (tmp_path / "c.safetensors").write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InfusionError) as caught:
        Concept.load(tmp_path / "c.safetensors")
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 4 * len(content) + 2**20
    assert "c.safetensors" in str(caught.value)
    assert re.search(REMEDIES, str(caught.value))


def test_the_corpus_is_large_and_the_good_file_good():
    assert len(CORPUS) >= 60
    assert Concept.from_bytes(GOOD).to_bytes() == GOOD


def resealed_as_it_is(content: bytes) -> bytes:
    """The bytes with a checksum that fits, order and spaces of the header left alone."""
    found = re.search(rb'"infusion\.sha256":"[^"]*"', content)
    if not found:
        return content
    field = lambda digits: b'"infusion.sha256":"' + digits + b'"'  # noqa: E731
    blank = content.replace(found[0], field(b"0" * 64), 1)
    return blank.replace(field(b"0" * 64), field(hashlib.sha256(blank).hexdigest().encode()), 1)


def mutated(rng: np.random.Generator) -> bytes:
    """A good file with a few random changes to header or payload and, mostly, a checksum that fits again."""
    content = bytearray(GOOD)
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(8, len(content))), rng.integers(5)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at] = int(rng.integers(256))
        elif kind == 2:
            del content[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            letters = rng.integers(32, 127, int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
            content[at:at] = letters if rng.random() < 0.5 else "²é犬\u2028\x1b".encode()[: len(letters) + 3]
        else:
            source = int(rng.integers(8, len(content)))
            content[at:at] = content[source : source + 12]
    changed = len(content) - len(GOOD)
    length = max(0, LENGTH + changed) if rng.random() < 0.8 else LENGTH
    header, payload = bytes(content[8 : 8 + length]), bytes(content[8 + length :])
    if rng.random() < 0.5:
        return resealed_as_it_is(with_header(header, payload))
    try:
        parsed = json.loads(header)
        parsed["__metadata__"]["infusion.sha256"] = "0" * 64
    except (ValueError, KeyError, TypeError, RecursionError):
        return with_header(header, payload)
    return resealed(with_header(json.dumps(parsed).encode(), payload))


def fuzz(count: int, seed: int) -> int:
    """Load `count` mutated files; returns how many were still concepts (a changed name, a changed value)."""
    rng = np.random.default_rng(seed)
    accepted = 0
    for _ in range(count):
        content = mutated(rng)
        start = time.process_time()
        try:
            concept = Concept.from_bytes(content)
        except InfusionError:
            pass
        else:
            assert (
                concept.to_bytes(next(s for s in ("q6", "fp16", "fp32") if concept.to_bytes(s) == content)) == content
            )
            accepted += 1
        assert time.process_time() - start < 1
    return accepted


def test_fuzz():
    assert 0 < fuzz(2_000, seed=1) < 2_000


def test_fuzz_sets_no_memory_aside():
    tracemalloc.start()
    fuzz(300, seed=3)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.slow
def test_fuzz_long():
    assert 0 < fuzz(50_000, seed=2) < 50_000
