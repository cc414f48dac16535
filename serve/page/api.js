// The endpoint, as this page speaks to it.

export class EndpointError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const KEY = "lorafleet.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function send(path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new EndpointError("The endpoint cannot be reached. Is it up?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The endpoint answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the endpoint's own words: its status has to do.
  }
  const wait = response.headers.get("Retry-After");
  return new EndpointError(wait ? `${message} (again in ${wait} s)` : message, response.status);
}

export async function route(body, signal) {
  return (await send("v1/route", body, signal)).json();
}

// The adapters with their cards; only their names where the endpoint lists no more.
export async function adapters() {
  try {
    return (await (await send("v1/adapters")).json()).data;
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  const models = (await (await send("v1/models")).json()).data;
  return models.filter((model) => model.task).map(({ id, ...rest }) => ({ name: id, ...rest }));
}

// The chunks of a streamed answer, as they come.
export async function* stream(path, body, signal) {
  const response = await send(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new EndpointError(chunk.error.message);
    yield chunk;
  }
  throw new EndpointError("The connection ended before the answer did.");
}

// The data of server-sent events.
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new EndpointError("The connection broke off.");
  } finally {
    await reader.cancel().catch(() => {});
  }
}
