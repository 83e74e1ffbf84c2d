"""Figures of one user's page: gain relative to all users, mean gates, and position on the embedding map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from markupsafe import Markup

from proper.reports.figures import Figure
from proper.reports.formats import method_name, metric_name, plain, signed
from proper.reports.load import RoutedUser, UserGain
from proper.reports.narrative import gain_of
from proper.reports.svg import Axis, chart, join, key, linear, percent, symbol, tag

STEPS = (("groups", "population"), ("users", "groups"))
MOST_DOTS = 800


def standing(own: UserGain, everybody: Sequence[UserGain], metric: str) -> Figure | None:
    """Draw this user's gain by each step among the gains of all users."""
    strips = [_strip(own, everybody, step, below, metric) for step, below in STEPS]
    drawn = [strip for strip in strips if strip is not None]
    if not drawn:
        return None
    caption = "One faint dot a user, this user in colour; right of the line gained. "
    caption += " ".join(_rank(own, everybody, step) for step, _ in STEPS if gain_of(own, step) is not None)
    if own.queries:
        caption += f" {own.queries} queries of one user say little by themselves."
    return Figure("Gain at each step, among everybody", join(drawn), caption)


def _strip(own: UserGain, everybody: Sequence[UserGain], step: str, below: str, metric: str) -> Markup | None:
    gain = gain_of(own, step)
    if gain is None:
        return None
    known = [(user, value) for user in everybody if (value := gain_of(user, step)) is not None]
    across = linear([0.0, *(value for _, value in known)], pad=0.04)
    dots = [_dot(user, value, across.at(value)) for user, value in known[:: max(1, -(-len(known) // MOST_DOTS))]]
    zero = tag("line", x1=percent(across.at(0.0)), x2=percent(across.at(0.0)), y1="0", y2="100%", class_="grid zero")
    mark = symbol(0 if gain >= 0 else 1, across.at(gain), 50, f"{own.user}\ngain {signed(gain)}")
    title = f"gain in {metric_name(metric)}, {method_name(step).lower()} over {below}"
    label = f"{title}: {signed(gain)} among {len(known)} users"
    return chart(zero, *dots, tag("g", mark, class_="large"), height=58, label=label, x=Axis(across, title))


def _dot(user: UserGain, value: float, x: float) -> Markup:
    # The height depends only on the user id: it separates equal gains and is the same on every page.
    height = 15 + hashlib.blake2b(user.user.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] / 255 * 70
    tip = f"user {user.user}\ngain {signed(value)}"
    return tag("circle", cx=percent(x), cy=percent(height), r=3.5, class_="dot same faint", data_tip=tip)


def _rank(own: UserGain, everybody: Sequence[UserGain], step: str) -> str:
    gain = gain_of(own, step)
    values = [value for user in everybody if (value := gain_of(user, step)) is not None]
    under = sum(value < gain for value in values if gain is not None)
    return f"{method_name(step)}: {signed(gain)}, more than {under} of {len(values)} users."


def gates(own: RoutedUser, everybody: Sequence[RoutedUser]) -> Figure:
    """Draw this user's mean gates as bars, with the mean over all users."""
    mean = mean_gates(everybody)
    up = linear([0.0, *own.gates, *mean], pad=0.12)
    wide = 100 / len(own.gates)
    marks = []
    for expert, (gate, usual) in enumerate(zip(own.gates, mean, strict=True)):
        x, top, floor = expert * wide, up.at(gate), up.at(0.0)
        tip = f"expert {expert}\nthis user {plain(gate)}\neverybody {plain(usual)}"
        box = {"x": percent(x + wide * 0.25), "width": percent(wide * 0.5)}
        bar = tag("rect", **box, y=percent(100 - top), height=percent(top - floor), class_="bar gain")
        ends = {"x1": percent(x + wide * 0.12), "x2": percent(x + wide * 0.88)}
        line = tag("line", **ends, y1=percent(100 - up.at(usual)), y2=percent(100 - up.at(usual)), class_="usual")
        marks.append(tag("g", bar, line, data_tip=tip))
    differences = [gate - usual for gate, usual in zip(own.gates, mean, strict=True)]
    names = [((at + 0.5) * wide, str(at), signed(each, 2)) for at, each in enumerate(differences)]
    label = f"Mean gates over {len(own.gates)} experts, this user's and everybody's"
    drawing = chart(*marks, height=190, label=label, y=Axis(up, "mean gate by expert"), names=names)
    most = max(range(len(differences)), key=lambda at: abs(differences[at]))
    caption = f"Bars: this user. Dark lines: the mean of {len(everybody)} target users; below: the difference. "
    caption += f"Expert {most} stands out most ({signed(differences[most], 2)}); their main expert is {own.main}."
    return Figure("Gates against everybody's mean", drawing, caption)


def mean_gates(everybody: Sequence[RoutedUser]) -> list[float]:
    """Return the mean gate of every expert over users, with equal weight per user."""
    experts = max(len(user.gates) for user in everybody)
    return [
        sum(user.gates[expert] if expert < len(user.gates) else 0.0 for user in everybody) / len(everybody)
        for expert in range(experts)
    ]


def place(own: RoutedUser, everybody: Sequence[RoutedUser], near: Sequence[str]) -> Figure | None:
    """Draw all users' embeddings in two dimensions, with this user and the nearest ones marked."""
    known = [user for user in everybody if user.place is not None]
    if own.place is None or len(known) < 3:
        return None
    across, up = (linear([user.place[axis] for user in known if user.place], pad=0.06) for axis in (0, 1))
    shown = known[:: max(1, -(-len(known) // MOST_DOTS))] + [user for user in known if user.user in near]
    marks = []
    for user in shown:
        x, y = user.place or (0.0, 0.0)
        tip = f"user {user.user}\nmain expert {user.main}"
        if user.user in near:
            marks.append(symbol(2, across.at(x), up.at(y), tip))
        elif user.user != own.user:
            spot = {"cx": percent(across.at(x)), "cy": percent(100 - up.at(y))}
            marks.append(tag("circle", **spot, r=3.5, class_="dot same faint", data_tip=tip))
    here = symbol(0, across.at(own.place[0]), up.at(own.place[1]), f"user {own.user}")
    frame = tag("rect", x="0", y="0", width="100%", height="100%", class_="frame")
    label = f"Map of {len(known)} user embeddings with this user and the nearest"
    plot = chart(frame, *marks, tag("g", here, class_="large"), height=240, label=label)
    keys = tag("p", key(0, "this user"), key(2, "nearest"), class_="keys")
    caption = "A projection to two dimensions: who is near there need not be near in all of them."
    return Figure("On the map of embeddings", join([plot, keys]), caption)
