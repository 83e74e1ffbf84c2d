// Client of the server's API: API key if required, error messages, streamed answers.

const STORED = "proper-key";

export class Trouble extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

// Sends a request and returns the reply if its status is OK; `body` is sent as JSON.
async function ask(method, path, body, signal) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const sent = body === undefined ? undefined : JSON.stringify(body);
  let reply;
  try {
    reply = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (!reply.ok) throw await refused(reply);
  return reply;
}

async function refused(reply) {
  const said = await reply.json().then((body) => body.error, () => null);
  const words = {
    401: "The server requires another API key.",
    403: "This key may not do that",
    429: "Too much at once",
    503: "The server is stopping or not ready",
  }[reply.status];
  const detail = said?.message ?? `the server answered with status ${reply.status}`;
  const text = reply.status === 401 ? words : words ? `${words}: ${detail}.` : `${capital(detail)}.`;
  return new Trouble(text, reply.status, said?.code ?? null);
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export const call = async (method, path, body) => (await ask(method, path, body)).json();

// URL of a user: the id is one percent-encoded segment, whatever characters it has.
export const address = (user, rest = "") => `v1/users/${encodeURIComponent(user)}${rest}`;

// Calls `heard` with each chunk of a streamed reply.
export async function stream(path, body, heard, signal) {
  const reply = await ask("POST", path, { ...body, stream: true }, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The connection broke in the middle of the answer.");
    });
    if (done) throw new Trouble("The answer ended before it was complete.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Trouble(`${capital(piece.error.message)}.`, 500, piece.error.code);
      heard(piece);
    }
  }
}
