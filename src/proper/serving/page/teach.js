// Enrolment with three examples: sends them once, then shows the fit's progress until it is done.

import { Trouble, address, call } from "./api.js";
import { $, make } from "./dom.js";
import { missing, promptFields } from "./prompt.js";

const EXAMPLES = 3;
const EVERY = 400; // ms between two looks at the progress
const FORGIVEN = 5; // looks in a row that may fail

// Builds the fields of three examples. Returns a function that reads them.
export function exampleFields(template) {
  const all = Array.from({ length: EXAMPLES }, (_, at) => {
    const set = make("fieldset", {}, make("legend", {}, `Interaction ${at + 1}`));
    $("examples").append(set);
    const input = promptFields(set, template, `example-${at}`, 2);
    const output = make("input", { id: `example-${at}-answer`, dir: "auto", autocomplete: "off", "aria-required": "true" });
    set.append(make("div", { class: "field" }, make("label", { for: output.id }, "The user's answer"), output));
    return { input, output };
  });
  return {
    // The examples, or null after marking the first empty field.
    read: () => {
      const empty = all.flatMap(({ input, output }) => [...input.areas, output]).find((field) => !field.value.trim());
      if (empty) {
        missing(empty);
        return null;
      }
      return all.map(({ input, output }) => ({ input: input.text(), output: output.value.trim() }));
    },
    clear: () => all.flatMap(({ input, output }) => [...input.areas, output]).forEach((field) => { field.value = ""; }),
  };
}

let last = { said: "", ids: [] };

// Sends the examples; if sent again after a lost reply, they count once.
export async function teach(user, isNew, examples) {
  const said = JSON.stringify([user, examples]);
  if (said !== last.said) last = { said, ids: examples.map(() => `playground-${random()}`) };
  const interactions = examples.map((example, at) => ({ id: last.ids[at], ...example }));
  const append = () => call("POST", address(user, "/interactions"), { interactions });
  if (!isNew) return append();
  try {
    return await call("POST", "v1/users", { user, interactions });
  } catch (error) {
    if (error.code !== "user_exists") throw error;
    return append();
  }
}

// Polls the fit until it ends; calls `progress(fit)` with each state. Returns the user's card.
export async function fitted(user, progress) {
  let failures = 0;
  for (;;) {
    let card = null;
    try {
      card = await call("GET", address(user));
      failures = 0;
    } catch (error) {
      failures += 1;
      if (error.status || failures > FORGIVEN) throw error;
    }
    if (card) {
      progress(card.fit);
      if (card.fit.state === "failed") throw new Trouble(`The fit failed: ${card.fit.message ?? "unknown reason"}.`);
      if (card.fit.state === "done" || card.fit.state === "idle") return card;
    }
    await new Promise((resolve) => { setTimeout(resolve, EVERY); });
  }
}

const random = () => [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(36).padStart(2, "0")).join("");
