"""Feature spaces on checkpoints that the tests make: ours equals the models written out; the judge's figures against counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from infusion.errors import InfusionError
from infusion.features import Lpips, feature_figures, left_out, load_features, load_lpips, lpips_figures
from infusion.judged import judged_figures, likeness, photo_embedding
from infusion.photos import to_tensor
from infusion.world.judge import Reading
from infusion.world.questions import asked_in
from infusion.world.tokenizer import build_tokenizer
from tests.world.test_requests import reading


def pictures(count, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer),
        "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_figures_equal_the_models_written_out(clip, dino):
    spaces = load_features(clip, dino)
    assert [s.name for s in spaces] == ["CLIP", "DINO"]
    custom, base, photos, classes = pictures(4, 0), pictures(4, 1), pictures(2, 2), (pictures(3, 3), pictures(3, 4))
    texts = ["a dog", "a dog", "a red car", "a red car"]
    found = feature_figures(spaces[0], custom, base, photos, texts, classes, 2)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        out = model(
            **processor(
                text=texts,
                images=[*custom, *base, *photos, *classes[0], *classes[1]],
                return_tensors="pt",
                padding=True,
            )
        )
    unit, words = out.image_embeds, out.text_embeds
    ours, theirs, real, of_class, of_class_base = unit.split((4, 4, 2, 3, 3))
    near = lambda value: pytest.approx(float(value), abs=1e-5)  # noqa: E731
    assert found.subject.value == near((ours @ real.T).mean())
    assert found.subject_above.value == near((ours @ real.T).mean() - (theirs @ real.T).mean())
    assert found.text.value == near((ours * words).sum(1).mean())
    assert found.text_above.value == near(((ours - theirs) * words).sum(1).mean())
    assert found.diversity.value == near(1 - (ours[0] @ ours[1] + ours[2] @ ours[3]) / 2)
    assert found.diversity_base.value == near(1 - (theirs[0] @ theirs[1] + theirs[2] @ theirs[3]) / 2)
    assert found.preservation.value == near((of_class @ real.T).mean())
    assert found.preservation_above.value == near((of_class @ real.T).mean() - (of_class_base @ real.T).mean())
    plain = feature_figures(spaces[1], custom, base, photos, texts, classes, 2)
    assert plain.text is None
    assert plain.text_above is None
    pixels = ViTImageProcessorPil.from_pretrained(dino)(images=custom[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = ViTModel.from_pretrained(dino).eval()(pixels).last_hidden_state[:, 0]
    assert torch.allclose(spaces[1].pictures(custom[:1]), token, atol=1e-5)


def test_what_is_missing_is_named_with_how_to_get_it(clip, tmp_path):
    assert load_features() == ()
    assert [m.split(":")[0] for m in left_out(())] == ["CLIP-I and CLIP-T", "DINO", "LPIPS"]
    assert [m.split(":")[0] for m in left_out(load_features(clip), Lpips(None))] == ["DINO"]
    with pytest.raises(InfusionError, match=r"CLIP weights .* cannot be loaded"):
        load_features(clip=str(tmp_path))


def test_weights_of_another_network_are_refused_when_they_are_loaded(clip, dino):
    with pytest.raises(InfusionError, match=r"DINO weights .* cannot be loaded"):
        load_features(dino=clip)
    with pytest.raises(InfusionError, match=r"CLIP weights .* cannot be loaded"):
        load_features(clip=dino)


def alexnet(weights=None):
    """AlexNet's feature layers as torchvision has them, with random weights."""
    torch.manual_seed(0)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d(3, 2)
    layers = [conv(3, 64, 11, 4, 2), relu(), pool, conv(64, 192, 5, 1, 2), relu(), pool, conv(192, 384, 3, 1, 1)]
    layers += [relu(), conv(384, 256, 3, 1, 1), relu(), conv(256, 256, 3, 1, 1), relu(), pool]
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


def test_lpips_equals_its_equation_and_its_figures_the_pairs_written_out(monkeypatch):
    """d(x, y) = sum over layers of the mean over pixels of w (unit features' difference)^2 (arXiv 1801.03924, equation 1)."""
    if not find_spec("torchvision"):
        with pytest.raises(InfusionError, match=r"LPIPS cannot be had .* the torchvision of your torch"):
            load_lpips()
    vision = ModuleType("torchvision")
    vision.models = SimpleNamespace(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT=None))
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    for name in ("torchmetrics.image.lpip", "torchmetrics.functional.image.lpips"):
        monkeypatch.setattr(f"{name}._TORCHVISION_AVAILABLE", True)
    lpips = load_lpips()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (70, 66, 3), dtype=np.uint8)) for _ in range(10)]
    layers = alexnet().features
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))

    def distance(a, b):
        total, x = 0.0, (torch.stack([to_tensor([i])[0] for i in (a, b)]) - shift) / scale
        with torch.no_grad():
            for place, layer in enumerate(layers):
                x = layer(x)
                if place in (1, 4, 7, 9, 11):
                    one, other = x / x.norm(dim=1, keepdim=True)
                    weight = lpips.net.lins[(1, 4, 7, 9, 11).index(place)].model[-1].weight.view(-1, 1, 1)
                    total += float((weight * (one - other) ** 2).sum(0).mean())
        return total

    near = lambda value: pytest.approx(value, rel=1e-3)  # noqa: E731
    assert lpips.distances(images[:3], images[3:6], batch=2).tolist() == near(
        [distance(a, b) for a, b in zip(images[:3], images[3:6], strict=True)]
    )
    assert float(lpips.distances(images[:1], images[:1])) == 0
    ours, theirs, photos = images[:4], images[4:8], images[8:]
    found = lpips_figures(lpips, ours, theirs, photos, 2)
    assert found.diversity.value == near((distance(*ours[:2]) + distance(*ours[2:])) / 2)
    assert found.diversity_base.value == near((distance(*theirs[:2]) + distance(*theirs[2:])) / 2)
    assert found.diversity_above.value == near(found.diversity.value - found.diversity_base.value)
    closest = [min(distance(p, photo) for photo in photos) for p in (*ours, *theirs)]
    assert found.nearest_photo.value == near(sum(closest[:4]) / 4)
    assert found.nearest_photo_above.value == pytest.approx((sum(closest[:4]) - sum(closest[4:])) / 4, abs=1e-4)


def test_what_a_prompt_asks_for():
    assert asked_in("a sketch of a dog on the left in the snow") == {
        "background": "snow",
        "style": "sketch",
        "position": "left",
    }
    assert asked_in("a dog next to a car on the street") == {"background": None, "style": None, "position": None}
    assert asked_in("a neon picture of a cat in the city")["style"] == "neon"  # not "a picture of"
    assert asked_in("a photo of a dog on desert sand")["background"] == "desert"
    assert asked_in("On the beach, a dog.")["background"] == "beach"
    assert asked_in("a photo of a dog in sepia, in the snow.") == {
        "background": "snow",
        "style": "sepia",
        "position": None,
    }
    assert asked_in("a photo of a dog")["style"] == "photo"


class Told:
    """A judge that says what it is told, one part of the pictures after another."""

    def __init__(self, *parts):
        self.parts = iter(parts)

    def read(self, pixels):
        return next(self.parts)


def test_judged_figures():
    photo = Reading("beach", "photo", (reading("dog", "red", x=0.5),))
    right = Reading("snow", "photo", (reading("dog", "red"),))
    leaky = Reading("beach", "photo", (reading("dog", "green"),))
    nothing = Reading(None, "photo", ())
    prompts = [
        "a photo of a dog on the left in the snow",
        "a photo of a dog in the snow",
        "a photo of a dog in the snow",
    ]
    judge = Told([right, leaky, nothing], [leaky, right, right], [photo, photo, leaky], [leaky, right], [right, right])
    found = judged_figures(judge, *(pictures(3, i) for i in range(3)), prompts, (pictures(2, 3), pictures(2, 4)), 3)
    ours = [1.0, 0.75, 0.0]  # red blue plain none; green is wrong; nothing was found
    theirs = [0.75, 1.0, 1.0]
    assert found.attributes.value == pytest.approx(sum(ours) / 3)
    assert found.attributes_above.value == pytest.approx((sum(ours) - sum(theirs)) / 3)
    assert found.text.value == pytest.approx((1 + 0.5 + 0.5) / 3)  # background, style and, in the first, position
    assert found.likeness.value == pytest.approx(48**0.5, rel=1e-4)  # nothing was found in the third
    assert found.leaks.keys() == {"background", "position"}  # no prompt asks for another style
    assert found.leaks["background"].custom.value == 0.5
    assert found.leaks["background"].base.value == 0.5
    assert found.leaks["background"].unread == 1
    assert found.leaks["position"].custom.value == 0
    assert found.pulls.keys() == {"position"}  # every prompt names a background and a style
    apart, theirs_apart = (right.subjects[0].embedding - leaky.subjects[0].embedding).norm(), [1, 1, 0]
    assert found.variety.value == pytest.approx(float(apart))  # of two, since nothing was found in the third
    assert found.variety_above.value == pytest.approx(float(apart) * (1 - sum(theirs_apart) / 3))
    truth = photo_embedding([photo, photo, leaky])
    of_class = [likeness(r, truth) for r in (leaky, right)]
    assert found.preservation.value == pytest.approx(sum(of_class) / 2)
    assert found.preservation_above.value == pytest.approx((of_class[0] - of_class[1]) / 2)
    assert (found.pulls["position"].custom.n, found.pulls["position"].unread) == (1, 1)  # the third shows nothing


def test_figures_of_embeddings_equal_loops():
    """Two prompts of three pictures each, every subject with an embedding of its own."""
    generator = torch.Generator().manual_seed(0)

    def some(count):
        vectors = torch.nn.functional.normalize(torch.randn(count, 48, generator=generator), dim=1)
        return [Reading("snow", "photo", (replace(reading("dog", "red"), embedding=v),)) for v in vectors]

    ours, theirs, real, class_ours, class_theirs = parts = [some(n) for n in (6, 6, 2, 2, 2)]
    shown = (*(pictures(len(p), i) for i, p in enumerate(parts[:3])), ["a photo of a dog in the snow"] * 6)
    found = judged_figures(Told(*parts), *shown, (pictures(2, 3), pictures(2, 4)), 3)
    embedding = lambda r: r.subjects[0].embedding  # noqa: E731
    truth = torch.nn.functional.normalize(sum(map(embedding, real)) / 2, dim=0)

    def mean_cosine(part):
        return sum(float(embedding(r) @ truth) for r in part) / len(part)

    def mean_distance(part):
        prompts = [[embedding(r) for r in part[i : i + 3]] for i in (0, 3)]
        pairs = [(a - b).norm() for prompt in prompts for a, b in combinations(prompt, 2)]
        return float(sum(pairs) / len(pairs))

    for value, above, by in (
        (found.likeness, found.likeness_above, [mean_cosine(ours), mean_cosine(theirs)]),
        (found.variety, found.variety_above, [mean_distance(ours), mean_distance(theirs)]),
        (found.preservation, found.preservation_above, [mean_cosine(class_ours), mean_cosine(class_theirs)]),
    ):
        assert value.value == pytest.approx(by[0], rel=1e-5)
        assert above.value == pytest.approx(by[0] - by[1], abs=1e-6)
        assert abs(above.value) > 1e-3


def test_of_two_subjects_the_one_of_the_class_is_meant():
    both = Reading("snow", "photo", (reading("car", "blue", found=0.9), replace(reading("dog", "red"), found=0.8)))
    photo = Reading("beach", "photo", (reading("dog", "red"),))
    three, classes = (pictures(1, i) for i in range(3)), (pictures(1, 3), pictures(1, 4))
    judge = Told([both], [photo], [photo], [photo], [photo])
    found = judged_figures(judge, *three, ["a photo of a dog next to a car"], classes, 1, "dog")
    assert found.attributes.value == 1  # by the car, whose colour is another, it were less


def test_what_half_of_the_photos_show_is_nothing_that_they_share():
    photos = [Reading(b, "photo", (reading("dog", "red"),)) for b in ("beach", "beach", "snow", "city")]
    shown = Reading("beach", "photo", (reading("dog", "red"),))
    parts = (pictures(1, 0), pictures(1, 1), pictures(4, 2), ["a photo of a dog in a room"])
    for real, shared in ((photos, False), (photos[:3], True)):
        judge = Told([shown], [shown], real, [shown], [shown])
        found = judged_figures(judge, *parts, (pictures(1, 3), pictures(1, 4)), 1)
        assert ("background" in found.leaks) == shared


def test_a_facing_pulls_wherever_most_photos_share_it():
    def facing(way):
        return Reading("snow", "photo", (replace(reading("dog", "red"), facing=way),))

    left, right, unsure = facing("left"), facing("right"), facing(None)
    judge = lambda photos: Told([left, left, unsure], [left, right, right], photos, [left], [right])  # noqa: E731
    parts = (
        *(pictures(3, i) for i in range(3)),
        ["a photo of a dog in the snow"] * 3,
        (pictures(1, 3), pictures(1, 4)),
    )
    found = judged_figures(judge([left, left, right]), *parts, 3)
    assert "facing" not in found.leaks  # no prompt asks for one
    pulled = found.pulls["facing"]
    assert (pulled.custom.value, pulled.base.value, pulled.unread) == (1, 0.5, 1)
    assert "facing" not in judged_figures(judge([left, right, unsure]), *parts, 3).pulls


def test_a_sketch_is_not_asked_for_colours():
    photo = Reading("beach", "photo", (reading("dog", "red"),))
    sketch = Reading("snow", "sketch", (reading("dog", None),))
    judge = Told([sketch], [photo], [photo], [photo], [photo])
    three, classes = (pictures(1, i) for i in range(3)), (pictures(1, 3), pictures(1, 4))
    found = judged_figures(judge, *three, ["a sketch of a dog in the snow"], classes, 1)
    assert found.variety is None  # one picture a prompt
    assert found.attributes.value == pytest.approx(
        sum(getattr(sketch.subjects[0], n) == getattr(photo.subjects[0], n) for n in ("pattern", "accessory")) / 2
    )


def test_photos_without_a_subject_are_no_error():
    empty = Reading("beach", "photo", ())
    classes = (pictures(1, 3), pictures(1, 4))
    found = judged_figures(Told(*[[empty]] * 5), *(pictures(1, i) for i in range(3)), ["a dog"], classes, 1)
    assert found.preservation is None
    assert found.likeness is None
    assert found.text is None
    assert found.leaks == {}
