// Streams three answers side by side, token by token, with the expert gates of each token.

import { stream } from "./api.js";
import { make } from "./dom.js";

// The columns, lowest tier first: name and explanation of each.
const TIERS = [
  ["population", "Population", "One model, shared by all users."],
  ["groups", "Group", "Shared experts, weighted by the user's embedding."],
  ["users", "User", "The experts plus the user's own adapter."],
];
const COLOURS = 8;

export const makeColumns = () => TIERS.map((tier) => new Column(...tier));
export const userColumn = (user, at) => new Column("users", user, "This user's model.", `user-${at}`);

class Column {
  constructor(tier, name, about, key = tier) {
    Object.assign(this, { tier, name, text: "", gates: [], before: null });
    this.answer = make("div", { class: "answer", dir: "auto" });
    this.pills = make("p", { class: "pills" });
    this.past = make("p", { class: "before", dir: "auto", hidden: true });
    this.title = make("h4");
    this.bars = make("ul");
    this.box = make("div", { class: "gates", hidden: true }, this.title, this.bars);
    const id = `column-${key}`;
    this.element = make("article", { class: "column", "aria-labelledby": id },
      make("header", {}, make("h3", { id }, make("bdi", {}, name)), make("p", { class: "note" }, about)),
      this.answer, this.past, this.pills, this.box);
    this.answer.addEventListener("keydown", (event) => this.#move(event));
    this.answer.addEventListener("pointerleave", () => this.#show(null));
    this.answer.addEventListener("focusout", () => this.#show(null));
    this.#empty("No answer yet.");
  }

  // Requests an answer and shows it as it streams; resolves when it is complete.
  async ask(prompt, user, model, signal) {
    this.reset();
    this.answer.classList.add("waiting");
    this.answer.setAttribute("aria-busy", "true");
    const proper = { tier: this.tier, gates: true };
    try {
      await stream("v1/completions", { model, prompt, user: user || undefined, proper }, (piece) => this.#hear(piece), signal);
      if (!this.text) this.#empty("(an empty answer)");
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.#pill("stopped", "bad");
    } finally {
      this.answer.classList.remove("waiting");
      this.answer.removeAttribute("aria-busy");
    }
  }

  // Clears the column for the next answer.
  reset(words) {
    Object.assign(this, { text: "", gates: [] });
    this.#listed(false);
    this.answer.replaceChildren();
    this.pills.replaceChildren();
    this.past.hidden = true;
    this.box.hidden = true;
    if (words) this.#empty(words);
  }

  // Shows the previous answer, and whether the new one differs.
  compare(before) {
    this.past.replaceChildren(make("b", {}, "Before"), before || "(an empty answer)");
    this.past.hidden = false;
    this.#pill(before === this.text ? "same as before" : "changed", before === this.text ? "" : "good");
  }

  #hear(piece) {
    const { choices: [choice], proper } = piece;
    if (proper && !this.pills.hasChildNodes()) this.#who(proper);
    const gates = proper?.gates ?? [];
    this.gates.push(...gates);
    const text = choice?.text ?? "";
    this.text += text;
    if (text) this.#token(text, gates);
    if (gates.length) this.#show(null);
  }

  #who({ tier, version, fallback }) {
    const words = {
      users: `own adapter, version ${version}`,
      groups: this.tier === "users" ? "no own adapter: the group model answers" : "own embedding",
      none: "unknown user: the mean user embedding",
      population: "no experts",
      base: "the bare backbone",
    };
    this.#pill(words[tier] ?? tier, this.tier === "users" && tier === "users" ? "good" : "");
    if (fallback) this.#pill(fallback, "bad");
  }

  #token(text, gates) {
    if (!gates.length) {
      // A piece without gates is held-back text of the last token, if there is a token.
      (this.answer.querySelector(".token:last-child") ?? this.answer).append(text);
      return;
    }
    this.#listed(true);
    const mean = average(gates);
    const first = !this.answer.querySelector(".token");
    const token = make("span", {
      class: `token c${top(mean) % COLOURS}`, role: "option", tabindex: first ? "0" : "-1", "aria-selected": "false",
      "aria-label": `${text.trim() || "space"}: ${mean.map((gate, at) => `expert ${at + 1} ${percent(gate)}`).join(", ")}`,
    }, text);
    for (const kind of ["pointerenter", "focus"]) token.addEventListener(kind, () => this.#show(token, text, mean));
    this.answer.append(token);
  }

  #listed(on) {
    const attributes = { role: "listbox", "aria-orientation": "horizontal", "aria-label": `${this.name}: tokens of the answer` };
    for (const [name, value] of Object.entries(attributes)) {
      if (on) this.answer.setAttribute(name, value);
      else this.answer.removeAttribute(name);
    }
  }

  // The gate bars of one token, or of the whole answer.
  #show(token, text, gates) {
    for (const other of this.answer.querySelectorAll(".token")) {
      other.classList.toggle("shown", other === token);
      other.setAttribute("aria-selected", String(other === token));
    }
    const shown = token ? gates : this.gates.length ? average(this.gates) : [];
    this.box.hidden = !shown.length;
    this.title.textContent = token ? `Gates of “${text.trim() || "␣"}”` : "Gates, mean of the answer";
    if (shown.length) this.bars.style.setProperty("--even", `${100 / shown.length}%`);
    while (this.bars.children.length > shown.length) this.bars.lastChild.remove();
    shown.forEach((gate, at) => {
      const item = this.bars.children[at] ?? this.bars.appendChild(bar(at));
      item.querySelector("i").style.width = percent(gate);
      item.querySelector("b").textContent = percent(gate);
    });
  }

  #move(event) {
    const tokens = [...this.answer.querySelectorAll(".token")];
    const at = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    if (!tokens[to]) return;
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  }

  #pill(words, kind) {
    this.pills.append(make("span", { class: `pill ${kind}` }, words));
  }

  #empty(words) {
    this.answer.replaceChildren(make("span", { class: "empty" }, words));
  }
}

const bar = (at) => make("li", { class: `c${at % COLOURS}` },
  make("span", {}, `expert ${at + 1}`), make("div", { class: "track", "aria-hidden": "true" }, make("i")), make("b"));

const average = (rows) => rows[0].map((_, at) => rows.reduce((sum, row) => sum + row[at], 0) / rows.length);
const top = (gates) => gates.indexOf(Math.max(...gates));
const percent = (share) => `${Math.round(100 * share)}%`;
