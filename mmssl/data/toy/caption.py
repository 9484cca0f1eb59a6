"""What a scene of the toy world looks like at its start, in words: one sentence, or several."""

from __future__ import annotations

from mmssl.data.toy.scene import Body, Dice, Scene

_FRAMES = (
    "{subject} {relation} {other}{room}.",
    "there is {subject} {relation} {other}{room}.",
    "a picture of {subject} {relation} {other}{room}.",
    "{subject}{room}, {relation} {other}.",
    "one can see {subject}{room}, {relation} {other}.",
)
_LARGE = ("large", "big", "huge")
_SMALL = ("small", "little", "tiny")
_RELATIONS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_PACES = {"slow": ("slowly", "lazily"), "steady": ("steadily", "evenly"), "fast": ("fast", "quickly")}
_ROOMS = {True: (" in a dark room", " at night", ""), False: (" in a bright room", " by day", "")}


def describe(scene: Scene, dice: Dice) -> str:
    """One sentence that names the largest body, where it is from another one, and sometimes the room."""
    subject, other = scene.subject, scene.bodies[0]
    across, down = subject.x - other.x, subject.y - other.y
    if abs(across) > abs(down):
        relation = "right" if across > 0 else "left"
    else:
        relation = "below" if down > 0 else "above"
    return dice.pick(_FRAMES).format(
        subject=_name(subject, dice.pick(_LARGE), dice),
        other=_name(other, dice.pick(_SMALL), dice),
        relation=dice.pick(_RELATIONS[relation]),
        room=dice.pick(_ROOMS[scene.dark]),
    )


def tell(scene: Scene, dice: Dice) -> str:
    """Two to four sentences: the first introduces the bodies, the others say more about those."""
    subject = f"the {scene.subject.color} {scene.subject.shape}"
    surface = "plain" if scene.subject.texture == "plain" else f"{scene.subject.texture} all over"
    more = [f"{subject} is {surface} and bounces {dice.pick(_PACES[scene.motion])}."]
    more += [
        f"{dice.pick(('next to it is', 'beside it one sees'))} the {dice.pick(_SMALL)} {body.color} {body.shape}."
        for body in scene.bodies[:-1]
    ]
    return " ".join([describe(scene, dice), *more[: 1 + int(dice.uniform(0, len(more)))]])


def _name(body: Body, size: str, dice: Dice) -> str:
    words = [size, body.color, body.shape]
    if body.texture != "plain":
        words.insert(dice.pick((1, 2)), body.texture)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])
