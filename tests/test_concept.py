"""The concept file: size, saved equals loaded, every damage refused, bad files each with their own sentence."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save, save_file

import infusion
from infusion.concept import MAX_FILE, MAX_WORD, BaseInfo, Concept
from infusion.errors import InfusionError, InfusionWarning
from infusion.packing import BLOCK, in_order, on_grid, pack, packed_size, unpack
from tests.conftest import random_concept

# Paths and value lengths of Stable Diffusion 1.5's cross-attention layers.
SD15 = {
    **{f"down_blocks.{b}.attentions.{a}.transformer_blocks.0.attn2": 320 * 2**b for b in range(3) for a in range(2)},
    "mid_block.attentions.0.transformer_blocks.0.attn2": 1280,
    **{
        f"up_blocks.{b}.attentions.{a}.transformer_blocks.0.attn2": 1280 // 2 ** (b - 1)
        for b in (1, 2, 3)
        for a in range(3)
    },
}
SETTINGS = {
    "steps": 400,
    "batch": 16,
    "learning_rate": 0.01,
    "max_timestep": 950,
    "strength": 1.0,
    "flip": True,
    "masked": True,
    "two_streams": True,
    "seed": 0,
}


def sd15_concept(seed: int = 0, name: str = "milo", word: str = "dog") -> Concept:
    generator = torch.Generator().manual_seed(seed)
    residuals = {p: torch.randn(n, generator=generator) for p, n in SD15.items()}
    return Concept(name, word, residuals, SETTINGS, BaseInfo("stable-diffusion-v1", 512, "0123456789abcdef"))


def relative_error(a: dict, b: dict) -> float:
    x, y = (torch.cat([r[p] for p in a]) for r in (a, b))
    return float((x - y).norm() / x.norm())


def test_an_sd15_concept_is_at_most_11264_bytes():
    assert sum(SD15.values()) == 12_480
    assert len(sd15_concept().to_bytes()) <= 11_264
    assert len(sd15_concept(name="m" * 64, word="w" * 64).to_bytes()) <= 11_264
    longest = max(n for n in range(64) if len(json.dumps("犬" * n)) <= MAX_WORD)
    assert len(sd15_concept(name="m" * 64, word="犬" * longest).to_bytes()) <= 11_264
    with pytest.raises(InfusionError, match="no class word"):
        sd15_concept(word="犬" * (longest + 1))


@pytest.mark.parametrize("seed", range(3))
def test_white_noise_keeps_95_percent(seed):
    concept = sd15_concept(seed)
    assert relative_error(concept.residuals, concept.on_grid().residuals) < 0.05


@pytest.mark.parametrize("scale", [0.0, 1e-35, 1e-20, 1.0, 1e5])
def test_the_grid_is_where_it_says(scale):
    generator = torch.Generator().manual_seed(1)
    values = {
        "a.attn2": scale * torch.randn(70, generator=generator),
        "b.attn2": scale * torch.rand(5, generator=generator),
    }
    once = on_grid(values)
    twice = on_grid(once)
    assert all(torch.equal(once[p], twice[p]) for p in values)
    if scale > 1e-30:
        assert relative_error(values, once) < 0.05
    for p in values:
        assert once[p].shape == values[p].shape


def test_a_file_is_read_by_what_its_document_says():
    """docs/format.md alone: blocks of 64, each with its largest magnitude as bfloat16; then 6 bits a value, lowest bits first."""
    concept = sd15_concept()
    content = concept.to_bytes("q6")
    (payload,) = (bytes(t.numpy().tobytes()) for t in load_safetensors(content).values())
    values = torch.cat([*concept.residuals.values()])
    blocks = -(-len(values) // 64)
    peaks = np.frombuffer(payload[: 2 * blocks], "<u2").astype(np.uint32)
    peaks = (peaks << 16).view(np.float32)
    bits = int.from_bytes(payload[2 * blocks :], "little")
    found = [((bits >> 6 * i & 63) - 32) * float(peaks[i // 64]) / 31 for i in range(0, len(values), 97)]
    error = np.array(found) - values[::97].numpy()
    assert np.abs(error).max() <= peaks.max() / 31 / 2 + 1e-6
    assert peaks[0] == pytest.approx(float(values[:64].abs().max()), rel=0.01)


@pytest.mark.parametrize("count", [1, 3, 4, 63, 64, 65, 130])
@pytest.mark.parametrize("scheme", ["q6", "fp16", "fp32"])
def test_packing_takes_what_it_says_and_equals_a_naive_loop(count, scheme):
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    content = pack(values, scheme)
    assert len(content) == packed_size(count, scheme)
    unpacked = unpack(content, count, scheme)
    if scheme == "fp32":
        assert np.array_equal(unpacked, values)
    elif scheme == "fp16":
        assert np.array_equal(unpacked, values.astype(np.float16).astype(np.float32))
    else:
        for start in range(0, count, BLOCK):
            block = torch.from_numpy(values[start : start + BLOCK])
            step = float(block.abs().max().bfloat16()) / 31
            naive = [max(-31, min(31, round(float(v) / step))) * step for v in block]
            assert np.allclose(unpacked[start : start + BLOCK], naive, atol=1e-6)


def test_layers_are_ordered_by_number_not_by_letter():
    assert in_order(["u.10.attn2", "u.9.attn2", "d.2.attn2"]) == ["d.2.attn2", "u.9.attn2", "u.10.attn2"]


@pytest.mark.parametrize("scheme", ["q6", "fp16", "fp32"])
def test_saved_equals_loaded(tmp_path, scheme):
    concept = sd15_concept().on_grid() if scheme == "q6" else sd15_concept()
    if scheme == "fp16":
        concept = Concept(concept.name, concept.word, on_grid(concept.residuals, "fp16"), SETTINGS, concept.base)
    path = concept.save(tmp_path / "milo.safetensors", scheme)
    loaded = Concept.load(path)
    assert (loaded.name, loaded.word, loaded.settings, loaded.base) == (
        concept.name,
        concept.word,
        SETTINGS,
        concept.base,
    )
    assert list(loaded.residuals) == in_order(SD15)
    assert all(torch.equal(loaded.residuals[k], concept.residuals[k]) for k in SD15)
    assert loaded.save(tmp_path / "again.safetensors", scheme).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.safetensors", "milo.safetensors"]


@pytest.mark.parametrize("scheme", ["q6", "fp16", "fp32"])
def test_saving_loses_nothing_unless_told_to(tmp_path, scheme):
    held = sd15_concept().on_grid(scheme)
    loaded = Concept.load(held.save(tmp_path / "milo.safetensors"))
    assert all(torch.equal(loaded.residuals[k], held.residuals[k]) for k in SD15)
    assert (tmp_path / "milo.safetensors").read_bytes() == held.to_bytes(scheme)


def test_other_programs_can_read_it(tmp_path):
    path = sd15_concept().save(tmp_path / "milo.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("residuals").dtype == torch.uint8
    for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution"):
        assert metadata[f"modelspec.{key}"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/infusion"
    assert load_safetensors(path.read_bytes())


def small_file(**more: object) -> bytes:
    residual = torch.randn(8, generator=torch.Generator().manual_seed(3))
    return Concept("milo", "dog", {"mid_block.attentions.0.transformer_blocks.0.attn2": residual}, **more).to_bytes()


def test_a_header_that_begins_as_a_pickle_does_is_read():
    """Lengths of 640 and 1,152 bytes begin with 80 02 and 80 04."""
    seen = set()
    for pad in range(700):
        content = small_file(settings={"note": "x" * pad})
        if content[0] == 0x80 and content[1] in (2, 4):
            seen.add(content[1])
            assert Concept.from_bytes(content).to_bytes() == content
    assert seen == {2, 4}


def test_every_bit_flip_is_refused():
    content = small_file()
    for i in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(InfusionError):
            Concept.from_bytes(bytes(flipped))


def test_every_truncation_and_extension_is_refused():
    content = small_file()
    for length in range(len(content)):
        with pytest.raises(InfusionError):
            Concept.from_bytes(content[:length])
    for extra in (b"\0", b" ", b"x" * 4096):
        with pytest.raises(InfusionError):
            Concept.from_bytes(content + extra)


def resealed(content: bytes, **changes: object) -> bytes:
    """The file with metadata changed and a checksum that fits again, so that deeper checks are reached."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    payload = changes.pop("payload", content[8 + length :])
    for key, value in changes.items():
        target = header if key == "residuals" else header["__metadata__"]
        target[key if key == "residuals" else key.replace("__", ".")] = value
    header["__metadata__"]["infusion.sha256"] = "0" * 64
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blank = len(text).to_bytes(8, "little") + text + payload
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"infusion__format": "2"}, "has format '2', this version reads 1; upgrade"),
        ({"infusion__scheme": "q5"}, "contradicts itself"),
        ({"infusion__scheme": "fp32"}, "contradicts itself"),
        ({"infusion__layers": "m0.0:9"}, "contradicts itself"),
        ({"infusion__layers": "m0.0:999999"}, "contradicts itself"),
        ({"infusion__layers": "m0.0:4 m0.0:4"}, "a layer twice"),
        ({"infusion__layers": "m0.0:99999999999999"}, "is damaged"),
        ({"infusion__layers": "m0.0:0"}, "contradicts itself"),
        ({"infusion__layers": "d9.0.0:8"}, None),
        ({"infusion__name": "../../etc"}, "no concept name"),
        ({"infusion__word": ""}, "no class word"),
        ({"infusion__settings": "[1]"}, "is no object"),
        ({"infusion__settings": '{"a":[1]}'}, "no plain values"),
        ({"infusion__settings": '{"steps": 1}'}, "not as Infusion writes it"),
        ({"modelspec__resolution": "9" * 4000 + "x"}, "not as Infusion writes it"),
        ({"infusion__extra": "more"}, "not as Infusion writes it"),
        ({"residuals": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not as Infusion writes it"),
        ({"payload": b"\xff\x7f" + small_file()[-6:]}, "is not finite"),
        ({"payload": b"\x00\x7f" + small_file()[-6:]}, "exceeds"),
        ({"payload": small_file()[-8:-6] + b"\x00" * 6}, "not as Infusion writes it"),
    ],
)
def test_files_that_lie_with_a_checksum_that_fits(changes, message):
    content = resealed(small_file(), **changes)
    if message is None:
        assert list(Concept.from_bytes(content).residuals) == ["down_blocks.9.attentions.0.transformer_blocks.0.attn2"]
        return
    with pytest.raises(InfusionError, match=message):
        Concept.from_bytes(content)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(InfusionError, match="no concept file"):
        Concept.load(path)
    with pytest.raises(InfusionError, match="no concept file"):
        Concept.load(tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"x")
    with pytest.raises(InfusionError, match="pickle or zip"):
        Concept.load(path)
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"a": 1}, protocol))
        with pytest.raises(InfusionError, match="pickle"):
            Concept.load(path)
    loras = [
        save({"unet.lora_A.weight": torch.zeros(2)}),
        save({"unet.x.lora_B.weight": torch.zeros(3 * 2**20)}),  # larger than any concept
        save({"lora_unet_mid.lora_up.weight": torch.zeros(2)}, {"ss_tag_frequency": "t" * 60_000}),
        save({f"unet.{i}.lora_A.weight": torch.zeros(2) for i in range(900)}),  # its header too
    ]
    for content in loras:
        path.write_bytes(content)
        with pytest.raises(InfusionError, match="is a LoRA"):
            Concept.load(path)
    save_file({"<cat-toy>": torch.zeros(2)}, path)
    with pytest.raises(InfusionError, match="load_textual_inversion"):
        Concept.load(path)
    for nonsense in (
        b"",
        b"<html>" * 9,
        b"\xff" * 40,
        (2**63).to_bytes(8, "little") + b"{}" * 9,
        (16).to_bytes(8, "little") + b"[" * 16 + b"x" * 9,
    ):
        path.write_bytes(nonsense)
        with pytest.raises(InfusionError):
            Concept.load(path)
    deep = b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(InfusionError):
        Concept.load(path)
    with path.open("wb") as file:
        file.truncate(8 * 2**30)  # sparse: takes no disk
    tracemalloc.start()
    with pytest.raises(InfusionError, match="is larger than"):
        Concept.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * MAX_FILE + 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "word", "residuals", "message"),
    [
        ("", "dog", {}, "is no concept name"),
        ("my dog", "dog", {}, "is no concept name"),
        ("<milo>", "dog", {}, "is no concept name"),
        ("m" * 65, "dog", {}, "is no concept name"),
        ("milo", " ", {}, "no class word"),
        ("milo", "dog", {"a": torch.zeros(2, 2)}, "must be a vector"),
        ("milo", "dog", {"a": torch.zeros(0)}, "must be a vector"),
        ("milo", "dog", {"a": torch.tensor([1.0, float("nan")])}, "not finite"),
        ("milo", "dog", {"a": torch.tensor([65_000.0])}, "exceeds"),  # fp16 would hold it, but its neighbours not
        ("milo", "dog\n", {}, "no class word"),
        ("milo", "dog", {"a b": torch.zeros(1)}, "no path of a layer"),
        ("milo", "dog", {"\u00b2": torch.zeros(1)}, "no path of a layer"),
    ],
)
def test_bad_values(name, word, residuals, message):
    with pytest.raises(InfusionError, match=message):
        Concept(name, word, residuals)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": float("nan")}, "finite numbers"),
        ({"layers": ["up"]}, "finite numbers"),
        ({"note": None}, "finite numbers"),
        ({"note": "\x1b[31m"}, "finite numbers"),
        ({"\x1b[31m": 1}, "finite numbers"),
        ({"max_timestep": 0}, "max_timestep is 0; it must be a whole number"),
        ({"max_timestep": "650"}, "max_timestep is '650'; it must be a whole number"),
        ({"note": "x" * 2000}, "more than 1,024 bytes"),
    ],
)
def test_settings_that_a_file_could_not_give_back(settings, message):
    with pytest.raises(InfusionError, match=message):
        Concept("milo", "dog", {}, settings)


def test_the_largest_values_can_be_kept_in_every_scheme():
    concept = Concept("milo", "dog", {"a": torch.tensor([6e4, -6e4, 1e-9])})
    for scheme in ("q6", "fp16", "fp32"):
        assert Concept.from_bytes(concept.to_bytes(scheme)).residuals["a"][0] == pytest.approx(6e4, rel=0.02)


def test_the_folder_is_flushed_after_the_file_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(stat.S_ISDIR(os.fstat(h).st_mode)), fsync(h))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("named"), replace(a, b))[1])
    sd15_concept().save(tmp_path / "milo.safetensors")
    assert done == [False, "named", True]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InfusionError, match="cannot be written"):
        sd15_concept().save(tmp_path / "file" / "milo.safetensors")
    with pytest.raises(InfusionError, match="'q9' is no scheme"):
        sd15_concept().save(tmp_path / "milo.safetensors", "q9")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = sd15_concept().save(tmp_path / "milo.safetensors")
    before = path.read_bytes()
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(InfusionError, match="No space left"):
                sd15_concept(seed=1).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["milo.safetensors"]


def test_other_weights_are_one_warning(pipe):
    other = random_concept(pipe.unet)
    other = Concept("milo", "dog", other.residuals, {}, BaseInfo("custom", 16, "f" * 16))
    with pytest.warns(InfusionWarning, match="other weights") as caught, infusion.attach(pipe, other):
        pass
    assert len([w for w in caught if w.category is InfusionWarning]) == 1
