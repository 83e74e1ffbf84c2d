// User picker: a list filtered by the typed prefix; an id that does not exist yet enrols a new user.

import { call } from "./api.js";
import { $, make } from "./dom.js";

const SHOWN = 50;

// Ids that begin with `start`, in order. The store is asked for the ids after the last possible id before them.
async function found(start) {
  const query = new URLSearchParams({ limit: String(SHOWN) });
  if (start) query.set("after", before(start));
  const page = await call("GET", `v1/users?${query}`);
  return page.data.filter((card) => card.id.startsWith(start));
}

// The last id before `start`, with no id between the two.
function before(start) {
  const letters = [...start];
  const last = letters.pop().codePointAt(0) - 1;
  // There are no characters between these two, and none below the first.
  const code = last === 0xdfff ? 0xd7ff : Math.max(last, 1);
  return letters.join("") + String.fromCodePoint(code) + "\u{10ffff}";
}

// Returns whether a user with this id exists.
export const known = async (user) => (await found(user)).find((card) => card.id === user) ?? null;

// Connects the field; `chosen(id, card or null)` and `trouble(error)` are the callbacks.
export function picker(chosen, trouble) {
  const [field, list] = [$("user-id"), $("users")];
  let [options, at, asked] = [[], -1, 0];

  const close = () => {
    list.hidden = true;
    at = -1;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
  };
  const mark = (index) => {
    at = index;
    [...list.children].forEach((item, place) => item.setAttribute("aria-selected", String(place === at)));
    if (at >= 0) {
      field.setAttribute("aria-activedescendant", list.children[at].id);
      list.children[at].scrollIntoView({ block: "nearest" });
    } else field.removeAttribute("aria-activedescendant");
  };
  const choose = (option) => {
    asked += 1;
    field.value = option.id;
    close();
    chosen(option.id, option.card);
  };
  const show = async () => {
    const [start, turn] = [field.value.trim(), ++asked];
    let cards;
    try {
      cards = await found(start);
    } catch (error) {
      if (turn === asked) trouble(error);
      cards = [];
    }
    if (turn !== asked || document.activeElement !== field) return;
    options = cards.map((card) => ({ id: card.id, card }));
    if (start && !options.some((option) => option.id === start)) options.unshift({ id: start, card: null });
    list.replaceChildren(...options.map((option, place) => {
      const kind = option.card === null ? "new user" : TIERS[option.card.tier] ?? option.card.tier;
      const item = make("li", { role: "option", id: `users-${place}`, "aria-selected": "false" },
        make("bdi", {}, option.id), make("span", {}, kind));
      item.addEventListener("pointerdown", (event) => event.preventDefault());
      item.addEventListener("click", () => choose(option));
      return item;
    }));
    list.hidden = options.length === 0;
    field.setAttribute("aria-expanded", String(options.length > 0));
    mark(-1);
  };

  field.addEventListener("input", show);
  field.addEventListener("click", () => { if (list.hidden) show(); });
  field.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move) {
      event.preventDefault();
      if (list.hidden) show();
      else mark(at < 0 && move < 0 ? options.length - 1 : (at + move + options.length) % options.length);
    } else if (event.key === "Escape" && !list.hidden) {
      event.preventDefault();
      close();
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (!list.hidden && at >= 0) choose(options[at]);
      else settle();
    }
  });
  field.addEventListener("blur", () => {
    close();
    settle();
  });

  // On leaving the field, its content becomes the selected user.
  let settled = "";
  const settle = async () => {
    const [who, turn] = [field.value.trim(), ++asked];
    if (who === settled) return;
    try {
      const card = who ? await known(who) : null;
      if (turn === asked) chosen(who, card);
    } catch (error) {
      if (turn === asked) {
        trouble(error);
        chosen(who, null);
      }
    }
  };
  return {
    // Until this resolves, the previous user stays selected.
    ready: settle,
    // Updates the field to the selected user.
    settled: (who) => {
      settled = who;
      field.value = who;
    },
  };
}

const TIERS = { users: "own adapter", groups: "own embedding", none: "not fitted yet" };
