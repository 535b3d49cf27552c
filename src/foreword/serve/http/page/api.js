// What the page asks the server, and what goes wrong on the way, in words.

const STORED = "foreword.key";
let inMemory = "";

/** The API key of this tab; "" without one. A browser may refuse storage: then it lasts until the page is left. */
export function key() {
  try {
    return sessionStorage.getItem(STORED) ?? inMemory;
  } catch {
    return inMemory;
  }
}

export function keep(value) {
  inMemory = value;
  try {
    sessionStorage.setItem(STORED, value);
  } catch {
    // in memory, then
  }
}

/** Something that went wrong: `message` is for people, `status` is HTTP's (0: there was no answer). */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The answer to a request, as JSON. */
export async function ask(path, body, signal) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw broken(error);
  }
}

/** The events of a streamed answer, one object each. Ends when the server says that it has ended. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => { throw broken(error); });
      if (done) throw broken();
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const said = JSON.parse(data);
        if (said.error) throw new Problem(inWords(statusOf(said.error), said.error));
        yield said;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, body, signal) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (key()) headers.Authorization = `Bearer ${latin(key())}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
                                   cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server can’t be reached. Check that it is running and that you are connected, then try again.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Problem(inWords(response.status, told.error ?? {}, response.headers.get("Retry-After")), response.status);
}

/** A header holds bytes, which JavaScript writes as the first 256 characters. */
const latin = (text) => String.fromCharCode(...new TextEncoder().encode(text));

function broken(error) {
  if (error?.name === "AbortError") return error;
  return new Problem("The connection broke before the end. What had come is above; write again for a whole answer.");
}

/** Inside a stream the status was sent long ago; the code tells. */
const statusOf = (error) => ({ timeout: 504, shutting_down: 503, queue_full: 429 })[error.code] ?? 500;

function inWords(status, error, after) {
  const said = error.message ? sentence(error.message) : `It answered with status ${status}.`;
  const again = after ? `Try again in ${after} s.` : "Try again in a moment.";
  switch (status) {
    case 401:
      return key() ? "The server doesn’t take this key. Check it and enter it again." : "This server asks for an API key. Enter one above.";
    case 404: return `${said} The list of tasks was read again.`;
    case 408: return `The request took too long to send. ${again}`;
    case 413: return "The prompt is too large for this server. Shorten it.";
    case 429: return `The server is busy and its queue is full. ${again}`;
    case 503: return "The server is shutting down. Try again when it is back.";
    case 504: return "There was no answer in time. Ask for fewer tokens, or try again.";
    default: return status < 500 ? said : `The server failed. ${said}`;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
