// Entry point of the playground: user selection, prompt, enrolment and deletion.

import { address, call, key } from "./api.js";
import { makeColumns, userColumn } from "./answers.js";
import { $, tell } from "./dom.js";
import { picker } from "./users.js";
import { missing, promptFields } from "./prompt.js";
import { exampleFields, fitted, teach } from "./teach.js";

const MOST_COMPARED = 6;
const columns = makeColumns();
$("columns").append(...columns.map((column) => column.element));

// `who`: the user's id, "" for none; `card`: the server's record of the user, null for a new user.
const state = { model: null, stage: null, who: "", card: null, busy: null, answered: null };
let prompt = null;
let examples = null;
let field = null;

function trouble(error) {
  if (error.status === 401) {
    const refused = key.get() !== null;
    key.forget();
    $("locked").hidden = false;
    tell($("trouble"), refused ? error.message : "");
    $("key").focus();
  } else tell($("trouble"), error.message);
}

// Runs one action at a time; shows its error, and disables its button meanwhile.
async function action(button, work) {
  if (state.busy) return;
  state.busy = button;
  tell($("trouble"), "");
  for (const one of [$("ask"), $("compare-go"), $("teach-go"), $("delete")]) one.disabled = true;
  try {
    await field?.ready();
    await work();
  } catch (error) {
    trouble(error);
  } finally {
    state.busy = null;
    for (const one of [$("ask"), $("compare-go"), $("teach-go")]) one.disabled = false;
    $("delete").disabled = state.card === null;
  }
}

// The list of users has ids and tiers only; the details of a user are fetched afterwards.
async function chosen(who, card) {
  Object.assign(state, { who, card });
  field.settled(who);
  if (!state.busy) $("delete").disabled = card === null;
  $("user-status").textContent = !who
    ? "No user is chosen: the user model answers with the mean user embedding."
    : card === null
      ? `${who} is new: no data until interactions are added.`
      : described(who, card);
  if (card === null || "fit" in card) return;
  try {
    const whole = await call("GET", address(who));
    if (state.who === who && state.card === card) chosen(who, whole);
  } catch (error) {
    trouble(error);
  }
}

function described(who, { tier, version, interactions }) {
  const has = { users: "an own adapter", groups: "an own embedding and no adapter", none: "no fitted model yet" }[tier] ?? `the tier ${tier}`;
  const more = [version ? `version ${version}` : "", interactions ? `${interactions} interactions logged` : ""];
  return [`${who} has ${has}`, ...more.filter(Boolean)].join(", ") + ".";
}

// Requests all three answers and returns them.
async function ask() {
  const [sent, stop] = [prompt.text(), new AbortController()];
  $("stop").hidden = false;
  $("stop").onclick = () => stop.abort();
  $("said").textContent = "";
  try {
    const done = await Promise.allSettled(columns.map((column) => column.ask(sent, state.who, state.model, stop.signal)));
    const failed = done.find((one) => one.status === "rejected");
    if (failed) {
      stop.abort();
      throw failed.reason;
    }
  } finally {
    $("stop").hidden = true;
  }
  const stopped = stop.signal.aborted;
  state.answered = stopped ? null : { sent, who: state.who };
  $("said").textContent = stopped ? "Stopped." : columns.map(({ name, text }) => `${name}: ${text || "empty"}.`).join(" ");
  return columns.map((column) => column.text);
}

// Answers the prompt as each of these users.
async function compareUsers(users) {
  const sent = prompt.text();
  const compared = users.map((user, at) => userColumn(user, at));
  $("compare-said").textContent = "";
  $("compared").replaceChildren(...compared.map((column) => column.element));
  const stop = new AbortController();
  const done = await Promise.allSettled(compared.map((column) => column.ask(sent, column.name, state.model, stop.signal)));
  const failed = done.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
  $("compare-said").textContent = compared.map(({ name, text }) => `${name}: ${text || "empty"}.`).join(" ");
}

// Marks the first empty field of the prompt; returns whether there was one.
function unwritten() {
  const empty = prompt.empty();
  if (empty) missing(empty);
  return Boolean(empty);
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (unwritten()) tell($("trouble"), "The prompt is empty.");
  else action($("ask"), ask);
});
$("ask-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask-form").requestSubmit();
});
$("ask-form").addEventListener("input", () => { $("sent").textContent = prompt.text(); });

$("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const users = [...new Set($("compare-ids").value.split(",").map((user) => user.trim()).filter(Boolean))];
  const warn = (text) => tell($("trouble"), text);
  if (unwritten()) warn("The prompt is empty.");
  else if (!users.length || users.length > MOST_COMPARED) {
    warn(`Type one to ${MOST_COMPARED} user ids, separated by commas.`);
    $("compare-ids").focus();
  } else action($("compare-go"), () => compareUsers(users));
});

$("teach-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  await field?.ready();
  const warn = (text) => tell($("trouble"), text);
  if (!state.who) {
    warn("No user is chosen: choose one, or type a new user id.");
    $("user-id").focus();
    return;
  }
  const taught = examples.read();
  if (!taught) warn("An interaction needs a prompt and an answer.");
  else if (unwritten()) warn("The prompt above is empty; it is answered again after the fit.");
  else action($("teach-go"), () => lesson(taught));
});

async function lesson(taught) {
  const { answered, who } = state;
  const same = answered && answered.sent === prompt.text() && answered.who === who;
  const before = same ? columns.map((column) => column.text) : await ask();
  $("fit").hidden = false;
  progress({ state: "queued", progress: 0, phase: null, message: null });
  const reply = await teach(who, state.card === null, taught);
  progress(reply.fit);
  chosen(who, await fitted(who, progress));
  await ask();
  columns.forEach((column, at) => column.compare(before[at]));
  const changed = columns.filter((column, at) => column.text !== before[at]).map(({ name }) => name.toLowerCase());
  $("said").textContent += changed.length ? ` Changed: ${changed.join(" and ")}.` : " Nothing changed.";
  $("answers").scrollIntoView({ block: "start" });
}

function progress(fit) {
  const words = { queued: "Queued", fitting: "Fitting", done: "Fitted", failed: "Failed", idle: "No fit is queued" };
  const share = fit.state === "done" || fit.state === "idle" ? 1 : fit.progress;
  $("fit-bar").value = share;
  const line = [`${words[fit.state] ?? fit.state}, ${Math.round(100 * share)}%`, fit.phase, fit.message].filter(Boolean).join(" · ");
  if ($("fit-status").textContent !== line) $("fit-status").textContent = line;
}

$("delete").addEventListener("click", async () => {
  await field.ready();
  if (state.card === null) return;
  $("sure-who").textContent = state.who;
  $("sure").showModal();
});
$("sure-no").addEventListener("click", () => $("sure").close());
$("sure-yes").addEventListener("click", () => {
  $("sure").close();
  // Deletes the user that the dialog named, and no other.
  const who = $("sure-who").textContent;
  action($("delete"), async () => {
    await call("DELETE", address(who));
    chosen("", null);
    state.answered = null;
    for (const column of columns) column.reset("No answer yet.");
    $("fit").hidden = true;
    $("user-status").textContent = `${who} is deleted.`;
    $("said").textContent = `${who} is deleted.`;
    $("user-id").focus();
  });
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (!typed) return;
  key.set(typed);
  $("key").value = "";
  start();
});
$("key-forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});

async function start() {
  tell($("trouble"), "");
  try {
    const model = (await call("GET", "v1/models")).data[0];
    $("locked").hidden = true;
    $("key-used").hidden = key.get() === null;
    if (state.model !== null) return;
    Object.assign(state, { model: model.id, stage: model.proper.stage });
    $("model").textContent = model.id;
    document.title = `${model.id} · proper`;
    prompt = promptFields($("ask-fields"), model.proper, "prompt-field", 3);
    $("sent").textContent = prompt.text();
    examples = exampleFields(model.proper);
    const hasUsers = ["groups", "users"].includes(model.proper.stage);
    for (const name of ["user", "compare", "teach"]) $(name).hidden = !hasUsers;
    field = picker(chosen, trouble);
    // Enabled only now: input during start-up would be lost.
    for (const name of ["user-id", "ask", "compare-ids", "compare-go", "teach-go"]) $(name).disabled = false;
    if (!hasUsers) tell($("trouble"), "This run has no stage 'users' yet: the same model gives all three answers.");
  } catch (error) {
    trouble(error);
  }
}

start();
