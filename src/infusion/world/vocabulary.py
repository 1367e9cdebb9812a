"""The words of the world: what can be drawn, and how captions name it.

Knows names, colours and synonyms only; nothing about drawing or models.
"""

from __future__ import annotations

CLASSES = ("dog", "cat", "bird", "fish", "teddy bear", "car", "boat", "house", "robot", "mug")
BACKGROUNDS = ("beach", "snow", "forest", "city", "desert", "space", "room", "meadow")
STYLES = ("photo", "sketch", "sepia", "neon", "pixel art")
PATTERNS = ("plain", "spotted", "striped", "checkered")
ACCESSORIES = ("none", "hat", "scarf", "star")
POSITIONS = ("left", "center", "right")

# sRGB, chosen far apart from each other so that a judge can name them after an autoencoder.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 26),
    "yellow": (250, 215, 45),
    "green": (52, 158, 72),
    "blue": (40, 92, 214),
    "purple": (136, 58, 180),
    "pink": (246, 130, 184),
    "brown": (126, 78, 44),
    "white": (244, 244, 240),
    "black": (42, 40, 48),
}

# Synonyms: the first is the canonical word. Captions draw the others now and then, so that the
# text encoder learns words and not templates.
CLASS_WORDS: dict[str, tuple[str, ...]] = {
    "dog": ("dog", "puppy"),
    "cat": ("cat", "kitten"),
    "bird": ("bird",),
    "fish": ("fish",),
    "teddy bear": ("teddy bear",),
    "car": ("car", "automobile"),
    "boat": ("boat", "sailboat"),
    "house": ("house", "cottage"),
    "robot": ("robot",),
    "mug": ("mug", "cup"),
}

BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a beach", "by the sea"),
    "snow": ("in the snow", "in snow", "in a snowy landscape", "in winter"),
    "forest": ("in the forest", "in a forest", "among trees", "in the woods"),
    "city": ("in the city", "in a city", "in front of a skyline", "on a street in the city"),
    "desert": ("in the desert", "in a desert", "on desert sand"),
    "space": ("in space", "in outer space", "on the moon", "in space among stars"),
    "room": ("in a room", "in the room", "in the living room", "indoors"),
    "meadow": ("in a meadow", "in the meadow", "on the grass", "on green grass"),
}

STYLE_PREFIXES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "photo of", "the photo of", "an image of", "a picture of", "image of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of", "sketch of"),
    "sepia": ("a sepia photo of", "an old sepia picture of", "a sepia image of"),
    "neon": ("a neon picture of", "a neon image of", "neon art of"),
    "pixel art": ("pixel art of", "a pixel art picture of", "a pixel art image of"),
}

STYLE_SUFFIXES: dict[str, tuple[str, ...]] = {
    "photo": ("as a photo",),
    "sketch": ("as a pencil sketch", "in sketch style"),
    "sepia": ("in sepia", "in sepia style"),
    "neon": ("in neon style", "in neon colors"),
    "pixel art": ("as pixel art", "in pixel art style"),
}

POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "to the left"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right", "to the right"),
}

ACCESSORY_PHRASES: dict[str, tuple[str, ...]] = {
    "hat": ("with a hat", "wearing a hat", "with a black hat"),
    "scarf": ("with a scarf", "wearing a scarf", "with a red scarf"),
    "star": ("with a star", "with a yellow star"),
}

PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain",),
    "spotted": ("spotted", "dotted"),
    "striped": ("striped",),
    "checkered": ("checkered",),
}
