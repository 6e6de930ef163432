"""What can be said about a scene: the words, the sentences, and reading facts back out of free text.

A scene is one to three objects in different quarters of the picture, listed in reading order (top row first, left to
right). A full description names every object with size and colour, and the place of a single object or the relation
of the first two.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("large", "small")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
_INVERSE = {"left of": "right of", "above": "below"}

# a, b, c: objects as "a large red circle"; place: a position; r, i: the relation of a to b and of b to a; long_r,
# long_i: those as "to the left of". Five full descriptions, each worded differently, by number of objects.
_FULL = {
    1: (
        "{a} in the {place}",
        "there is {a} in the {place} corner",
        "in the {place} there is {a}",
        "the picture shows {a} at the {place}",
        "a {colour} {shape} that is {size} in the {place}",
    ),
    2: (
        "{a} {r} {b}",
        "there is {a} {long_r} {b}",
        "{b} {i} {a}",
        "the picture shows {a} that is {r} {b}",
        "{b} is {long_i} {a}",
    ),
    3: (
        "{a} {r} {b} and {c}",
        "there is {c} and {a} {r} {b}",
        "{b} {i} {a} with {c}",
        "the picture shows {a} {r} {b} and also {c}",
        "{c} and {b} {long_i} {a}",
    ),
}
# The same with something left out: plain_a is "a red circle".
_PARTIAL = {
    1: ("{plain_a} in the {place}", "{a}"),
    2: ("{plain_a} {r} {plain_b}", "{a} and {b}", "{plain_a} and {b}"),
    3: ("{a} {r} {b}", "{plain_a} {r} {plain_b} and {plain_c}", "{a} and {b} and {c}"),
}
_TERSE = ("{plain_a}", "{plain_b}", "{plain_c}")

_SYNONYMS = {
    **dict.fromkeys(("big", "huge"), "large"),
    **dict.fromkeys(("little", "tiny"), "small"),
    **{f"{shape}s": shape for shape in SHAPES},
    **dict.fromkeys(("over", "atop"), "above"),
    **dict.fromkeys(("under", "beneath", "underneath"), "below"),
    "violet": "purple",
    "upper": "top",
    "lower": "bottom",
}
_ADJECTIVE = rf"(?:{'|'.join((*COLOURS, *SIZES))})"
_SHAPE = rf"(?:{'|'.join(SHAPES)})"
_OBJECT = re.compile(
    rf"\b(?P<before>(?:{_ADJECTIVE} (?:and )?)*)(?P<shape>{_SHAPE})\b"
    # "… that is red", but not "… is red square".
    rf"(?P<after>(?: that| which)? (?:is|are) {_ADJECTIVE}(?:(?: and)? {_ADJECTIVE})*(?! (?:{_ADJECTIVE}|{_SHAPE})\b))?"
)
_POSITION = re.compile(
    r"\b(?P<place>(?:top|bottom) (?:left|right))\b(?P<verb>(?: corner)? (?:there |we )?(?:is|are|see)\b)?"
)
# "in the top left of the picture" is a position, not a relation.
_RELATION = re.compile(r"(?<!top )(?<!bottom )\b(?:(?:left|right) of|above|below)\b")

Fact = tuple[str, ...]
"""("object", colour, shape) | ("size", size, colour, shape) | ("position", place, colour, shape) |
("relation", colour, shape, "left of" or "above", colour, shape)."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape; no two of a scene share both colour and shape, so that a caption's words name it."""

    shape: str
    colour: str
    size: str
    position: str

    @property
    def key(self) -> tuple[str, str]:
        """Colour and shape, which name the object."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class AttributeScores:
    """Facts of one caption, or of several added up (`+`), against what is in the pictures."""

    correct: int
    """Facts claimed that are true."""
    claimed: int
    covered: int
    """Facts that a full description has and the caption claims."""
    required: int

    @property
    def precision(self) -> float:
        """True ÷ claimed; 0 when nothing is claimed."""
        return self.correct / self.claimed if self.claimed else 0.0

    @property
    def recall(self) -> float:
        """Covered ÷ required."""
        return self.covered / self.required if self.required else 0.0

    def __add__(self, other: AttributeScores) -> AttributeScores:
        return AttributeScores(
            self.correct + other.correct,
            self.claimed + other.claimed,
            self.covered + other.covered,
            self.required + other.required,
        )


def describe(objects: tuple[SceneObject, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Five references, and metadata: `objects`, `relation`, and the `terse` and `partial` captions."""
    words = _words(objects)
    count = len(objects)
    metadata = {
        "objects": [asdict(each) for each in objects],
        "relation": words.get("r"),
        "terse": [template.format(**words) for template in _TERSE[:count]],
        "partial": [template.format(**words) for template in _PARTIAL[count]],
    }
    return tuple(template.format(**words) for template in _FULL[count]), metadata


def scenes_vocabulary() -> list[str]:
    """Every word of every caption that `describe` can make, sorted."""
    templates = [t for group in (*_FULL.values(), *_PARTIAL.values()) for t in group] + list(_TERSE)
    literal = {word for t in templates for text, *_ in string.Formatter().parse(t) for word in text.split()}
    values = (*SHAPES, *COLOURS, *SIZES, *POSITIONS, *_INVERSE, *_INVERSE.values(), "a", "to the")
    return sorted(literal | {word for value in values for word in value.split()})


def parse_caption(text: str) -> set[Fact]:
    """The facts that a caption claims, whatever its wording; words it does not know are passed over.

    Two colours on one shape are two claims, so that listing every colour costs precision.
    """
    tokens = re.findall(r"\w+", text.lower())
    line = " ".join(_SYNONYMS.get(token, token) for token in tokens)
    found = list(_OBJECT.finditer(line))
    facts: set[Fact] = set()
    keys: list[tuple[str, str] | None] = []
    for match in found:
        adjectives = f"{match['before']} {match['after'] or ''}".split()
        colours = [word for word in adjectives if word in COLOURS]
        shape = match["shape"]
        for colour in colours:
            facts.add(("object", colour, shape))
            facts.update(("size", word, colour, shape) for word in adjectives if word in SIZES)
        keys.append((colours[-1], shape) if colours else None)
    for index, (start, end) in enumerate(_gaps(found, len(line))):
        before = keys[index - 1] if index else None
        after = keys[index] if index < len(keys) else None
        facts |= _gap_facts(line[start:end], before, after, is_first=index == 0)
    return facts


def attribute_scores(caption: str, metadata: Mapping[str, Any]) -> AttributeScores:
    """How much of what a caption says of a scene is true, and how much of a full description it says."""
    objects = [SceneObject(**each) for each in metadata["objects"]]
    claimed = parse_caption(caption)
    required = required_facts(objects)
    return AttributeScores(
        correct=len(claimed & true_facts(objects)),
        claimed=len(claimed),
        covered=len(claimed & required),
        required=len(required),
    )


def true_facts(objects: Iterable[SceneObject]) -> set[Fact]:
    """Everything in the language of facts that holds of a scene."""
    listed = list(objects)
    facts = _object_facts(listed) | {("position", each.position, *each.key) for each in listed}
    for one, other in combinations(listed, 2):
        for a, b in ((one, other), (other, one)):
            (row_a, column_a), (row_b, column_b) = a.position.split(), b.position.split()
            if (column_a, column_b) == ("left", "right"):
                facts.add(("relation", *a.key, "left of", *b.key))
            if (row_a, row_b) == ("top", "bottom"):
                facts.add(("relation", *a.key, "above", *b.key))
    return facts


def required_facts(objects: Iterable[SceneObject]) -> set[Fact]:
    """What a full description says."""
    listed = list(objects)
    if len(listed) == 1:
        return _object_facts(listed) | {("position", listed[0].position, *listed[0].key)}
    first, second, *_ = listed
    return _object_facts(listed) | {("relation", *first.key, relation(first, second), *second.key)}


def relation(first: SceneObject, second: SceneObject) -> str:
    """How the first stands to the second in reading order: "above", or in the same row "left of"."""
    return "left of" if first.position.split()[0] == second.position.split()[0] else "above"


def _words(objects: tuple[SceneObject, ...]) -> dict[str, str]:
    first = objects[0]
    words = {"place": first.position, "colour": first.colour, "shape": first.shape, "size": first.size}
    for name, each in zip("abc", objects, strict=False):
        words[name] = f"a {each.size} {each.colour} {each.shape}"
        words[f"plain_{name}"] = f"a {each.colour} {each.shape}"
    if len(objects) > 1:
        r = relation(first, objects[1])
        i = _INVERSE[r]
        words |= {"r": r, "i": i, "long_r": _long(r), "long_i": _long(i)}
    return words


def _long(phrase: str) -> str:
    return f"to the {phrase}" if phrase.endswith(" of") else phrase


def _object_facts(objects: list[SceneObject]) -> set[Fact]:
    return {("object", *each.key) for each in objects} | {("size", each.size, *each.key) for each in objects}


def _gaps(found: list[re.Match[str]], length: int) -> list[tuple[int, int]]:
    """The stretches of text before, between and after the objects."""
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), length]
    return list(zip(starts, ends, strict=True))


def _gap_facts(gap: str, before: tuple[str, str] | None, after: tuple[str, str] | None, *, is_first: bool) -> set[Fact]:
    facts: set[Fact] = set()
    for match in _POSITION.finditer(gap):
        # "in the top left there is …" speaks of what follows, "… in the top left" of what came before.
        owner = after if is_first or match["verb"] else before
        if owner is not None:
            facts.add(("position", match["place"], *owner))
    if before is not None and after is not None:
        for phrase in {match[0] for match in _RELATION.finditer(gap)}:
            if phrase in _INVERSE:
                facts.add(("relation", *before, phrase, *after))
            else:
                upright = next(key for key, value in _INVERSE.items() if value == phrase)
                facts.add(("relation", *after, upright, *before))
    return facts
