"""Clients that send prompts, append interactions, or enrol and delete users; each repeats requests without a reply.

Independent of the faults. A reply that violates an assumption is recorded as a failure.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
from ledger import Answer, Ledger
from soak_users import GUESTS, LENGTHS, PROMPT, target

PAUSE = 0.15
"""Seconds before something is tried again."""
DELETION_SECONDS = 300.0
"""Within which a deletion that was acknowledged is done, a killed server's start included."""


@dataclass
class Client:
    """One of many, on a thread of its own until `stop`.

    Attributes:
        words: code words by user, of the users who exist from the beginning.
        model: the name of the served model.
    """

    name: str
    url: str
    model: str
    words: Mapping[str, str]
    ledger: Ledger
    stop: threading.Event
    random: Random
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def run(self, step: Callable[[], None]) -> None:
        """Repeat a step until `stop`; an exception is noted, it must not be."""
        try:
            while not self.stop.is_set():
                step()
        except Exception as error:
            self.ledger.amiss(f"{self.name} broke: {type(error).__name__}: {error}")
            raise
        finally:
            self.http.close()

    def send(self, what: str, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """Send once; None where no whole reply came. `what` names it in the counts."""
        try:
            reply = self.http.request(method, path, json=body)
        except httpx.TransportError as error:
            self.ledger.reply(f"{what}: {type(error).__name__}")
            return None
        code = "" if reply.is_success else f" {reply.json()['error']['code']}"
        self.ledger.reply(f"{what}: {reply.status_code}{code}")
        return reply

    def insist(self, what: str, method: str, path: str, body: Any = None) -> tuple[httpx.Response | None, bool]:
        """Send until a reply comes that is no failure of the server; say also whether it was sent more than once.

        The reply is None if the soak ends first.
        """
        again = False
        while True:
            reply = self.send(what, method, path, body)
            if reply is not None and reply.status_code < 500 and reply.status_code != 429:
                return reply, again
            again = True
            if self.stop.wait(PAUSE):
                return None, again

    # Caller

    def ask(self) -> None:
        """Ask for one answer, streamed or not, and sometimes leave before its end."""
        guests = [user for user in list(self.ledger.guests) if user not in self.ledger.deleted]
        strangers = [None, "nobody", f"stranger-{self.random.randrange(1000)}"]
        user = self.random.choice([*self.words, *self.words, *self.words, *guests[-3:], *strangers])
        length = self.random.choice(LENGTHS)
        if self.random.random() < 0.4:
            self.whole(user, length)
        elif self.random.random() < 0.25:
            self.streamed(user, length, leave=self.random.randrange(1, 6))
        else:
            self.streamed(user, length)

    def whole(self, user: str | None, length: int) -> Answer | None:
        """Ask without streaming."""
        asked = self.ledger.now
        reply = self.send("ask", "POST", "/v1/completions", self._body(user, length))
        if reply is None or not reply.is_success:
            self.stop.wait(PAUSE)
            return None
        said = reply.json()
        return self._note(user, length, said["choices"][0]["text"], said["proper"], True, asked)

    def streamed(self, user: str | None, length: int, leave: int | None = None) -> None:
        """Ask for a stream; go away after `leave` pieces."""
        asked, text, extras, ended, pieces = self.ledger.now, "", None, False, 0
        try:
            with self.http.stream(
                "POST", "/v1/completions", json={**self._body(user, length), "stream": True}
            ) as reply:
                if not reply.is_success:
                    reply.read()
                    self.ledger.reply(f"stream: {reply.status_code} {reply.json()['error']['code']}")
                for line in reply.iter_lines() if reply.is_success else ():
                    piece = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                    if "error" in piece:
                        self.ledger.reply(f"stream: {piece['error']['code']} under way")
                        break
                    for choice in piece.get("choices", []):
                        text, extras, pieces = text + choice["text"], piece["proper"], pieces + 1
                    ended = ended or line == "data: [DONE]"
                    if pieces == leave:
                        self.ledger.reply("stream: left")
                        break
                else:
                    self.ledger.reply(f"stream: {'200' if ended else 'cut off'}")
        except httpx.TransportError as error:
            self.ledger.reply(f"stream: {type(error).__name__}")
            self.stop.wait(PAUSE)
        if extras is not None:
            self._note(user, length, text, extras, ended, asked)

    def _body(self, user: str | None, length: int) -> dict[str, Any]:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": length}
        return body if user is None else {**body, "user": user}

    def _note(
        self, user: str | None, length: int, text: str, extras: Mapping[str, Any], whole: bool, asked: float
    ) -> Answer:
        said = extras["tier"], extras.get("version"), extras.get("fallback")
        answer = Answer(user, length, text, *said, whole, asked, self.ledger.now)
        self.ledger.answers.append(answer)
        return answer

    # Teaching

    def teach(self) -> None:
        """Send a new interaction of a user until it is acknowledged, and now and then once more."""
        user = self.random.choice([*self.words])
        word, first = self.words[user], len(self.ledger.sent)
        ids = [f"{self.name}-{first}-{at}" for at in range(self.random.randint(1, 3))]
        self.hand_in(user, word, ids)
        if self.random.random() < 0.2:
            reply, _ = self.insist("teach again", "POST", f"/v1/users/{user}/interactions", lesson(word, ids))
            if reply is not None and reply.is_success and reply.json()["accepted"]:
                self.ledger.amiss(f"{user}: {ids} were acknowledged before, and are new again")
        self.stop.wait(self.random.uniform(0.1, 0.6))

    def hand_in(self, user: str, word: str, ids: Sequence[str]) -> None:
        """Append interactions of a user who is there."""
        for one in ids:
            self.ledger.sent[user, one] = target(word)
        reply, again = self.insist("teach", "POST", f"/v1/users/{user}/interactions", lesson(word, ids))
        if reply is None:
            return
        if reply.status_code != 200 or reply.json()["accepted"] + reply.json()["duplicates"] != len(ids):
            self.ledger.amiss(f"{user}: {ids} were answered with {reply.status_code} {reply.text}")
            return
        if reply.json()["duplicates"] and not again:
            self.ledger.amiss(f"{user}: {ids} are said to be there before they were sent")
        self.ledger.acknowledged |= {(user, one) for one in ids}

    # Coming and going

    def visit(self) -> None:
        """Enrol a user; wait for the fit or not; sometimes delete them, sometimes take a version back."""
        marker = f"{self.random.getrandbits(64):016x}"
        user = f"guest {self.name}/{len(self.ledger.guests)}-{marker}"
        word, ids = GUESTS[len(self.ledger.guests) % len(GUESTS)], [f"a-{marker}", f"b-{marker}"]
        body = lesson(word, ids, marker)
        for one in body["interactions"]:
            self.ledger.sent[user, one["id"]] = one["output"]
        reply, again = self.insist("enrol", "POST", "/v1/users", {"user": user, **body})
        if reply is None:
            return
        if reply.status_code != 200 and not (again and reply.json()["error"]["code"] == "user_exists"):
            self.ledger.amiss(f"{user} could not be enrolled: {reply.text}")
            self.stop.wait(1)
            return
        # Whoever is there after no reply is there with all that was sent.
        self.ledger.acknowledged |= {(user, one) for one in ids}
        self.ledger.guests[user] = word
        for _ in range(self.random.randrange(30)):
            card = self.send("read", "GET", f"/v1/users/{path_of(user)}")
            if card is not None and card.is_success and card.json()["fit"]["state"] in ("done", "failed"):
                break
            if self.stop.wait(0.2):
                return
        if self.random.random() < 0.5:
            self.delete(user)
        if self.random.random() < 0.5:
            self.take_back(self.random.choice([*self.words]))

    def delete(self, user: str) -> None:
        """Delete a user, and see that nothing of theirs answers any more."""
        self.ledger.deleted.add(user)
        reply, again = self.insist("delete", "DELETE", f"/v1/users/{path_of(user)}")
        if reply is None:
            return
        if reply.status_code not in (200, 202) and not (again and reply.status_code == 404):
            self.ledger.amiss(f"{user} could not be deleted: {reply.text}")
        if reply.status_code == 202:
            self.await_deletion(user, reply.json()["id"])
        answer = self.whole(user, LENGTHS[0])
        if answer is not None and (answer.tier, answer.version) != ("none", None):
            self.ledger.amiss(f"{user} was deleted and still answers: {answer}")

    def await_deletion(self, user: str, job: str) -> None:
        """Ask how far a deletion is until it is done; it may not take for ever."""
        deadline = self.ledger.now + DELETION_SECONDS
        while self.ledger.now < deadline:
            state = self.send("deletion", "GET", f"/v1/deletions/{job}")
            if state is not None and state.is_success and state.json()["state"] == "done":
                return
            if state is not None and state.status_code == 404:
                self.ledger.amiss(f"the deletion of {user} was acknowledged and is not known: {state.text}")
                return
            if self.stop.wait(PAUSE):
                return
        self.ledger.amiss(f"the deletion of {user} is not done after {DELETION_SECONDS:g} s")

    def take_back(self, user: str) -> None:
        """Go back a version, where there is one to go back to."""
        held = self.send("versions", "GET", f"/v1/users/{path_of(user)}/versions")
        reply = self.send("rollback", "POST", f"/v1/users/{path_of(user)}/rollback", {})
        if held is None or reply is None or not held.is_success:
            return
        if reply.status_code == 409 and len(held.json()["data"]) > 1:
            self.ledger.amiss(f"{user} has versions {held.text}, and none to go back to: {reply.text}")


def lesson(word: str, ids: Sequence[str], marker: str = "") -> dict[str, Any]:
    """Return the body that hands in these interactions; their outputs end with the marker."""
    return {"interactions": [{"id": one, "input": PROMPT, "output": f"{target(word)} {marker}".strip()} for one in ids]}


def path_of(user: str) -> str:
    """Return a user id as a part of a path."""
    return user.replace(" ", "%20").replace("/", "%2F")
